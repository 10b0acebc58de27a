"""Stage distill: recover the pruned student with the ICMD loss; resumes from its own checkpoints."""

from typing import Any

from tasks._inputs import teacher_manifest, teacher_pipeline, train_clips
from tasks._stage import SCRATCH, Context
from tasks._validation import open_validation
from vdmini_core.artifacts import Plan, folder_digest, json_digest, read_json, write_json
from vdmini_core.distillation.answers import TeacherAnswers, teacher_needed
from vdmini_core.distillation.icmd import distill
from vdmini_core.distillation.validation import validation_table
from vdmini_core.models import Denoiser, load_denoiser, load_pipeline
from vdmini_core.pruning.surgery import save_denoiser
from vdmini_core.training.history import History

# Settings that change no training: how often a run reports and saves, how a step is computed, what watches it. A run
# that does not fit into memory may go on with other values of these.
MANNER: dict[str, Any] = {
    "loop": {"log_every", "checkpoint_every", "keep_checkpoints", "accumulate", "parallel"},
    "checkpointing": True,
    "compile": True,
    "validation": True,
    "keep": True,
}


def run(context: Context) -> None:
    settings = context.params.distill
    plan = read_json(context.input("plan") / "plan.json", Plan)
    inputs = {
        "teacher": teacher_manifest(context).digest,
        "pruned": folder_digest(context.input("prune") / "denoiser"),
        "latents": folder_digest(context.input("encode"), "*.safetensors"),
    }
    # Checkpoints outlive the outputs, which DVC empties before a run; another run's are ignored.
    fingerprint = json_digest({"settings": settings.model_dump(mode="json", exclude=MANNER), **inputs})
    checkpoints = SCRATCH / "checkpoints" / fingerprint[:16]
    history = History(checkpoints / "history.jsonl")

    def log(metrics: dict[str, float], step: int) -> None:
        history.log(metrics, step)
        context.log(metrics, step)

    parts = ("vae",) if settings.validation.every else ()
    pipeline, data = teacher_pipeline(context, *parts), train_clips(context)  # no denoiser is loaded yet

    def load_teacher() -> Denoiser:
        return load_pipeline(pipeline.folder, ("denoiser",), context.device).denoiser

    validation = open_validation(context, pipeline, load_teacher, history, checkpoints)
    answers = None
    if settings.teacher_draws > 0:
        of_answers = {name: inputs[name] for name in ("teacher", "latents")}
        answers = TeacherAnswers(SCRATCH / "answers", data, pipeline.process, settings, of_answers)
        answers.fill(load_teacher, context.device, context.track, context.should_stop)
    teacher = load_teacher() if teacher_needed(settings) else None
    student = load_denoiser(context.input("prune") / "denoiser", context.device)
    distill(
        teacher,
        student,
        teacher.surviving(plan.removed) if teacher else {},
        pipeline.process,
        data,
        settings,
        context.device,
        answers=answers,
        checkpoints=checkpoints,
        fingerprint=fingerprint,
        log=log,
        track=context.track,
        should_stop=context.should_stop,
        validation=validation,
    )
    if not context.main:
        return
    save_denoiser(student, context.folder / "denoiser")
    write_json(context.folder / "distill.json", context.provenance(**inputs))
    history.write(context.folder / "history.json")
    if validation is not None:
        report = validation.report(settings.loop.max_steps)
        (context.folder / "validation.md").write_text(validation_table(report, settings.keep))
        write_json(context.folder / "validation.json", report)
