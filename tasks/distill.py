"""Stage distill: recover the pruned student with the ICMD loss; resumes from its own checkpoints."""

import logging
from pathlib import Path
from typing import Any

from tasks._inputs import teacher_manifest, teacher_pipeline, train_clips
from tasks._stage import SCRATCH, Context, device_name
from vdmini_core.artifacts import Plan, folder_digest, json_digest, read_json, write_json
from vdmini_core.data.latents import LatentCache
from vdmini_core.distillation.icmd import distill
from vdmini_core.distillation.preflight import check_fits, memory_there, needed_memory
from vdmini_core.models import Denoiser, load_denoiser
from vdmini_core.models.sources import resolve_source
from vdmini_core.pruning.surgery import save_denoiser
from vdmini_core.settings import DistillSettings
from vdmini_core.training.history import History

logger = logging.getLogger("vdmini.distill")

# Settings that change no result: how often a run reports and saves, and how a step is computed. A run that does
# not fit into memory may go on with other values of these.
MANNER: dict[str, Any] = {
    "loop": {"log_every", "checkpoint_every", "keep_checkpoints", "accumulate", "parallel"},
    "checkpointing": True,
    "compile": True,
    "memory_check": True,
}


def run(context: Context) -> None:
    inputs = inputs_of(context)
    student, history = recover(context, inputs, SCRATCH / "checkpoints")
    if not context.main:
        return
    save_denoiser(student, context.folder / "denoiser")
    write_json(context.folder / "distill.json", context.provenance(**inputs))
    history.write(context.folder / "history.json")


def inputs_of(context: Context) -> dict[str, str]:
    """Digests of what a training reads."""
    return {
        "teacher": teacher_manifest(context).digest,
        "pruned": folder_digest(context.input("prune") / "denoiser"),
        "latents": folder_digest(context.input("encode"), "*.safetensors"),
    }


def fingerprint_of(settings: DistillSettings, inputs: dict[str, str]) -> str:
    """Names everything that a training's result depends on."""
    return json_digest({"settings": settings.model_dump(mode="json", exclude=MANNER), **inputs})


def recover(context: Context, inputs: dict[str, str], root: Path) -> tuple[Denoiser, History]:
    """The recovered student and its history; checkpoints lie in a folder of `root` that is this training's own."""
    settings = context.params.distill
    plan = read_json(context.input("plan") / "plan.json", Plan)
    # Checkpoints outlive the outputs, which DVC empties before a run; another run's are ignored.
    fingerprint = fingerprint_of(settings, inputs)
    checkpoints = root / fingerprint[:16]
    history = History(checkpoints / "history.jsonl")

    def log(metrics: dict[str, float], step: int) -> None:
        history.log(metrics, step)
        context.log(metrics, step)

    data = train_clips(context)
    if settings.memory_check:
        check_memory(context, plan, data)
    pipeline = teacher_pipeline(context, "denoiser")
    teacher = pipeline.denoiser
    student = load_denoiser(context.input("prune") / "denoiser", context.device)
    distill(
        teacher,
        student,
        teacher.surviving(plan.removed),
        pipeline.process,
        data,
        settings,
        context.device,
        checkpoints=checkpoints,
        fingerprint=fingerprint,
        log=log,
        track=context.track,
        should_stop=context.should_stop,
    )
    return student, history


def check_memory(context: Context, plan: Plan, data: LatentCache) -> None:
    """DoesNotFit where the training cannot fit; what cannot be estimated is tried."""
    manifest, settings = teacher_manifest(context), context.params.distill
    try:
        parts = needed_memory(resolve_source(manifest.source, manifest.revision), plan.removed, data, settings)
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("how much memory distillation needs is not known: %s", str(error).strip().splitlines()[0])
        return
    check_fits(parts, memory_there(context.device), f"this device ({device_name(context.device)})", settings)
