"""Stage distill: recover the pruned student with the ICMD loss; resumes from its own checkpoints."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks._inputs import code_digest, teacher_manifest, teacher_pipeline, train_clips
from tasks._stage import SCRATCH, Context, device_name, half_done
from tasks._validation import open_validation
from vdmini_core.artifacts import Plan, folder_digest, json_digest, read_json, write_json
from vdmini_core.data.latents import LatentCache
from vdmini_core.distillation.answers import TeacherAnswers, teacher_needed
from vdmini_core.distillation.icmd import distill
from vdmini_core.distillation.preflight import check_fits, memory_there, needed_memory
from vdmini_core.distillation.validation import Validation, validation_table
from vdmini_core.models import Denoiser, load_denoiser, load_pipeline
from vdmini_core.models.sources import resolve_source
from vdmini_core.pruning.surgery import save_model
from vdmini_core.settings import DistillSettings
from vdmini_core.training.distributed import clips_at_a_time
from vdmini_core.training.history import History

logger = logging.getLogger("vdmini.distill")

# Settings that change no training: how often a run reports and saves, how a step is computed, what watches it. A run
# that does not fit into memory may go on with other values of these.
MANNER: dict[str, Any] = {
    "loop": {"log_every", "checkpoint_every", "keep_checkpoints", "accumulate", "parallel"},
    "checkpointing": True,
    "compile": True,
    "memory_check": True,
    "validation": True,
    "keep": True,
}
CODE = ("data", "diffusion", "distillation", "evaluation", "models", "training")


@dataclass(frozen=True)
class Pruned:
    """A pruned student on disk, and how it follows from the teacher: as `pruning.baselines.Student` has it."""

    folder: Path
    removed: tuple[str, ...]
    channels: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recovered:
    """A student after its training, and what was seen of it."""

    student: Denoiser
    history: History
    validation: Validation | None


def run(context: Context) -> None:
    pruned = pruned_student(context)
    inputs = inputs_of(context, pruned)
    found = recover(context, pruned, inputs, SCRATCH / "checkpoints")
    if not context.main:
        return
    settings = context.params.distill
    save_model(found.student, context.folder / "denoiser")
    write_json(context.folder / "distill.json", context.provenance(**inputs))
    found.history.write(context.folder / "history.json")
    if found.validation is not None:
        report = found.validation.report(settings.loop.max_steps)
        (context.folder / "validation.md").write_text(validation_table(report, settings.keep))
        write_json(context.folder / "validation.json", report)


def pruned_student(context: Context) -> Pruned:
    """The student of stage prune."""
    plan = read_json(context.input("plan") / "plan.json", Plan)
    return Pruned(context.input("prune") / "denoiser", plan.removed)


def inputs_of(context: Context, pruned: Pruned) -> dict[str, str]:
    """Digests of what a training reads, its code and the teacher's noise algebra among it."""
    return {
        "code": code_digest(CODE),
        "process": json_digest(teacher_pipeline(context).process.facts()),
        "teacher": teacher_manifest(context).digest,
        "pruned": folder_digest(pruned.folder),
        "latents": folder_digest(context.input("encode"), "*.safetensors"),
    }


def fingerprint_of(settings: DistillSettings, inputs: dict[str, str]) -> str:
    """Names everything that a training's result depends on."""
    kept = settings.model_dump(mode="json", exclude=MANNER)
    if settings.icd_distance == "normalised":  # by the variance of the clips that are computed together
        kept["clips at a time"] = clips_at_a_time(settings.loop)
    return json_digest({"settings": kept, **inputs})


def recover(context: Context, pruned: Pruned, inputs: dict[str, str], root: Path) -> Recovered:
    """Train a pruned student; checkpoints lie in a folder of `root` that is this training's own."""
    settings = context.params.distill
    # Checkpoints outlive the outputs, which DVC empties before a run; another run's are ignored.
    fingerprint = fingerprint_of(settings, inputs)
    checkpoints = half_done(root, fingerprint)
    history = History(checkpoints / "history.jsonl")

    def log(metrics: dict[str, float], step: int) -> None:
        history.log(metrics, step)
        context.log(metrics, step)

    data = train_clips(context)
    if settings.memory_check:
        check_memory(context, pruned, data)
    pipeline = teacher_pipeline(context, *(("vae",) if settings.validation.every else ()))

    def load_teacher() -> Denoiser:
        return load_pipeline(pipeline.folder, ("denoiser",), context.device).denoiser

    validation = open_validation(context, pipeline, load_teacher, history, checkpoints)
    answers = None
    if settings.teacher_draws > 0:
        of_answers = {name: inputs[name] for name in ("teacher", "latents")}
        answers = TeacherAnswers(SCRATCH / "answers", data, pipeline.process, settings, of_answers)
        answers.fill(load_teacher, context.device, context.track, context.should_stop)
    teacher = load_teacher() if teacher_needed(settings) else None
    student = load_denoiser(pruned.folder, context.device)
    distill(
        teacher,
        student,
        teacher.surviving(pruned.removed) if teacher else {},
        pipeline.process,
        data,
        settings,
        context.device,
        answers=answers,
        channels=pruned.channels,
        checkpoints=checkpoints,
        fingerprint=fingerprint,
        log=log,
        track=context.track,
        should_stop=context.should_stop,
        validation=validation,
    )
    return Recovered(student, history, validation)


def check_memory(context: Context, pruned: Pruned, data: LatentCache) -> None:
    """DoesNotFit where the training cannot fit; what cannot be estimated is tried. Lost channels count as there."""
    manifest, settings = teacher_manifest(context), context.params.distill
    try:
        parts = needed_memory(resolve_source(manifest.source, manifest.revision), pruned.removed, data, settings)
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("how much memory distillation needs is not known: %s", str(error).strip().splitlines()[0])
        return
    check_fits(parts, memory_there(context.device), f"this device ({device_name(context.device)})", settings)
