"""L_task, the base model's own loss: one row and one file each, chosen by `distill.task`."""

from vdmini_core.distillation.task_losses.base import TaskLoss
from vdmini_core.distillation.task_losses.consistency import Consistency
from vdmini_core.distillation.task_losses.denoising import Denoising
from vdmini_core.distillation.task_losses.one_step import OneStep

TASK_LOSSES: dict[str, type[TaskLoss]] = {
    "denoising": Denoising,
    "consistency": Consistency,
    "one_step": OneStep,
}

__all__ = ["TASK_LOSSES", "TaskLoss"]
