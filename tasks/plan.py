"""Stage plan: which units go; the plan is a file that later stages follow."""

from tasks._inputs import teacher_manifest, teacher_pipeline, test_clips
from tasks._stage import Context
from vdmini_core.artifacts import SensitivityReport, file_digest, read_json, write_json
from vdmini_core.data.latents import condition_of
from vdmini_core.evaluation.plan_plot import plot_plan
from vdmini_core.pruning.candidates import best_plans
from vdmini_core.pruning.planning import describe_plan, evidence_of, make_plan


def run(context: Context) -> None:
    rows, file = test_clips(context).rows([0]), context.input("sensitivity") / "report.json"
    report, report_digest = read_json(file, SensitivityReport), file_digest(file)
    teacher_digest = teacher_manifest(context).digest
    denoiser = teacher_pipeline(context, "denoiser").denoiser
    plan = make_plan(
        denoiser,
        context.params.plan,
        rows["latents"],
        condition_of(rows),
        evidence_of(report),
        report_digest=report_digest,
        teacher_digest=teacher_digest,
        provenance=context.provenance(sensitivity=report_digest, teacher=teacher_digest),
    )
    write_json(context.folder / "plan.json", plan)
    (context.folder / "plan.md").write_text(describe_plan(plan))
    plot_plan(plan, denoiser.units, report.scores, report.costs.parts, context.folder / "plan.png")
    if context.params.plan.ratio is not None:
        best = best_plans(denoiser.on_meta(), context.params.plan, evidence_of(report))
        write_json(context.folder / "candidates.json", best)
    for name in ("plan.json", "plan.png"):
        context.tracker.artifact(context.folder / name)
    context.log({"size/unet_parameters": plan.student_parameters, "speed/flops": plan.student_flops}, 0)
