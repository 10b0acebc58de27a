"""What stage distill shows of its validations: metrics, pictures and alarms in MLflow."""

from collections.abc import Callable
from pathlib import Path

from tasks._inputs import evaluator, protocol, test_clips
from tasks._stage import Context
from vdmini_core.artifacts import Alarm, json_digest
from vdmini_core.distillation.validation import Validation
from vdmini_core.models import Denoiser, Pipeline
from vdmini_core.training.history import History


def open_validation(
    context: Context, pipeline: Pipeline, load_teacher: Callable[[], Denoiser], training: History, checkpoints: Path
) -> Validation | None:
    """The validation of this training, beside its checkpoints; None where it is off, or not for this process.

    Validations of another protocol (clips, sampler, evaluator) lie in a folder of their own.
    """
    settings = context.params.distill.validation
    if not settings.every:
        return None
    data = test_clips(context)  # in every process, so that none waits for one that was refused
    if not context.main:
        return None

    def show(picture: Path) -> None:
        context.tracker.artifact(picture, "validation")

    def alert(alarm: Alarm) -> None:
        context.tracker.tags({f"alarm.{alarm.name}": f"step {alarm.step}: {alarm.text}"})

    digest = json_digest({**protocol(context, settings), "test_clips": len(data)})
    return Validation(
        pipeline,
        load_teacher,
        data,
        evaluator(context),
        settings,
        training,
        checkpoints / f"validation-{digest[:16]}",
        log=context.log,
        show=show,
        alert=alert,
    )
