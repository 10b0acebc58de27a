"""Stage plan: which units go; the plan is a file that later stages follow."""

from tasks._inputs import teacher_manifest, teacher_pipeline, test_clips
from tasks._stage import Context
from vdmini_core.artifacts import file_digest, write_json
from vdmini_core.data.latents import condition_of
from vdmini_core.pruning.planning import describe_plan, make_plan


def run(context: Context) -> None:
    rows = test_clips(context).rows([0])
    report_digest = file_digest(context.input("sensitivity") / "report.json")
    teacher_digest = teacher_manifest(context).digest
    plan = make_plan(
        teacher_pipeline(context, "denoiser").denoiser,
        context.params.plan,
        rows["latents"],
        condition_of(rows),
        report_digest=report_digest,
        teacher_digest=teacher_digest,
        provenance=context.provenance(sensitivity=report_digest, teacher=teacher_digest),
    )
    write_json(context.folder / "plan.json", plan)
    (context.folder / "plan.md").write_text(describe_plan(plan))
    context.tracker.artifact(context.folder / "plan.json")
    context.log({"size/unet_parameters": plan.student_parameters, "speed/flops": plan.student_flops}, 0)
