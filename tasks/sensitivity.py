"""Stage sensitivity: bypass every block and pair of the teacher, judge content and motion; resumes unit by unit."""

import shutil

from tasks._inputs import code_digest, evaluator, protocol, teacher_manifest, teacher_pipeline, train_clips
from tasks._stage import SCRATCH, Context, device_name
from vdmini_core.artifacts import folder_digest, json_digest, write_json
from vdmini_core.evaluation.sensitivity_plots import plot_depth, plot_sensitivity
from vdmini_core.pruning.sensitivity import Sensitivity, sensitivity_table

CODE = ("data", "diffusion", "evaluation", "models", "pruning")


def run(context: Context) -> None:
    settings = context.params.sensitivity
    # Test clips are for the evaluation of what is chosen here.
    told = protocol(context, settings) | {"reference": "training clips through the teacher's VAE"}
    scratch = SCRATCH / "sensitivity" / fingerprint_of(context, told)[:16]
    analysis = Sensitivity(
        teacher_pipeline(context, "denoiser", "vae"),
        train_clips(context),
        evaluator(context),
        settings,
        scratch=scratch,
        track=context.track,
    )
    report = analysis.report(told, context.provenance(teacher=teacher_manifest(context).digest))
    write_json(context.folder / "report.json", report)
    (context.folder / "table.md").write_text(sensitivity_table(report))
    plot_sensitivity(report, context.folder / "sensitivity.png")
    plot_depth(report, context.folder / "depth.png")
    for name in ("report.json", "table.md", "sensitivity.png", "depth.png"):
        context.tracker.artifact(context.folder / name)
    for score in report.scores:
        figures = {"content": score.content.value, "motion": score.motion.value, **dict(score.quality)}
        context.log({f"sensitivity/{k}/{score.name}": v for k, v in figures.items() if isinstance(v, float)}, 0)
    shutil.rmtree(scratch, ignore_errors=True)


def fingerprint_of(context: Context, told: dict[str, object]) -> str:
    """What the measured rounds depend on: settings, teacher, clips, code and device."""
    return json_digest(
        {
            "protocol": told,
            "settings": context.settings.model_dump(mode="json"),
            "teacher": teacher_manifest(context).digest,
            "clips": folder_digest(context.input("encode"), "train-*"),
            "code": code_digest(CODE),
            "device": device_name(context.device),
        }
    )
