"""Stage sensitivity: bypass every block and pair of the teacher, judge content and motion."""

from tasks._inputs import evaluator, protocol, teacher_manifest, teacher_pipeline, test_clips
from tasks._stage import Context
from vdmini_core.artifacts import write_json
from vdmini_core.evaluation.plots import plot_sensitivity
from vdmini_core.pruning.sensitivity import measure_sensitivity, sensitivity_table


def run(context: Context) -> None:
    settings = context.params.sensitivity
    report = measure_sensitivity(
        teacher_pipeline(context, "denoiser", "vae"),
        test_clips(context),
        evaluator(context),
        settings,
        protocol(context, settings),
        context.provenance(teacher=teacher_manifest(context).digest),
        context.track,
    )
    write_json(context.folder / "report.json", report)
    (context.folder / "table.md").write_text(sensitivity_table(report))
    plot_sensitivity(report, context.folder / "sensitivity.png")
    for name in ("report.json", "table.md", "sensitivity.png"):
        context.tracker.artifact(context.folder / name)
    for score in report.scores:
        context.log({f"sensitivity/{k}/{score.name}": v for k, v in score.quality if isinstance(v, float)}, 0)
