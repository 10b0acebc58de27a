"""Stage sensitivity: bypass every block and pair of the teacher, judge content and motion; resumes unit by unit."""

import shutil
from pathlib import Path

from tasks._inputs import code_digest, evaluator, protocol, teacher_manifest, teacher_pipeline, train_clips
from tasks._stage import SCRATCH, Context, device_name, half_done
from vdmini_core.artifacts import folder_digest, json_digest, write_json
from vdmini_core.evaluation.sensitivity_plots import plot_depth, plot_sensitivity
from vdmini_core.pruning.sensitivity import Sensitivity, sensitivity_table

CODE = ("data", "diffusion", "evaluation", "models", "pruning")


def run(context: Context) -> None:
    told = told_of(context)
    scratch = scratch_of(context, told)
    analysis = analysis_of(context, scratch)
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


def measure_part(context: Context, round_: int, index: int, of: int) -> list[str]:
    """Measure every `of`-th undecided unit of a round, from `index` on; `run` finds them in the same scratch folder.

    The rounds before it have to be there in full. Returns the names.
    """
    analysis = analysis_of(context, scratch_of(context, told_of(context)))
    units = analysis.open_units(round_)[index::of]
    analysis.measure(units, round_)
    return units


def told_of(context: Context) -> dict[str, object]:
    """How clips are made and judged. Test clips are for the evaluation of what is chosen here."""
    return protocol(context, context.params.sensitivity) | {"reference": "training clips through the teacher's VAE"}


def scratch_of(context: Context, told: dict[str, object]) -> Path:
    """Where measured rounds are kept until the report is written."""
    return half_done(SCRATCH / "sensitivity", fingerprint_of(context, told))


def analysis_of(context: Context, scratch: Path) -> Sensitivity:
    """The analysis, ready to measure."""
    return Sensitivity(
        teacher_pipeline(context, "denoiser", "vae"),
        train_clips(context),
        evaluator(context),
        context.params.sensitivity,
        scratch=scratch,
        track=context.track,
    )


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
