"""What distillation would need in memory: one real training step, on the meta device."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from vdmini_core.data.latents import CONDITION
from vdmini_core.diffusion.process import VPrediction
from vdmini_core.distillation.heads import Discriminator
from vdmini_core.distillation.icmd import ICMD
from vdmini_core.evaluation.activations import AsOnAccelerator, Storages, saved_storages, storages_of, total_bytes
from vdmini_core.models import Condition, Denoiser
from vdmini_core.settings import DistillSettings

WEIGHT = 4  # bytes: the training loop keeps float32


class Recomputed:
    """Stands in for activation checkpointing: a block leaves what it was given, and is run again one at a time."""

    def __init__(self) -> None:
        self.kept: Storages = {}
        self.largest = 0

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        self.kept |= storages_of(args)
        answers: list[Any] = []
        weights = block.parameters() if isinstance(block, torch.nn.Module) else ()
        inside = saved_storages(lambda: answers.append(block(*args)), weights)
        self.largest = max(self.largest, total_bytes({k: v for k, v in inside.items() if k not in self.kept}))
        return answers[0]


def distillation_memory(
    teacher: Denoiser,
    student: Denoiser,
    matches: dict[str, str],
    settings: DistillSettings,
    latents: torch.Tensor,
    condition: Condition,
) -> dict[str, int]:
    """Bytes by purpose, for networks and a batch on the meta device.

    Activations are the student's turn of a step in which every loss counts, the fullest moment: what the
    teacher left for it, and what autograd saves for its backward pass; with checkpointing, what each block was given,
    and the block that saves most. With `teacher_draws` it is an upper bound: the teacher, counted here, then only
    fills the cache before the student is there, or lends its encoder. ValueError where the class has no checkpointing.
    """
    meta = torch.device("meta")
    with meta:
        heads = Discriminator(teacher.encoder_widths())
    teacher.model.requires_grad_(False)
    heads.requires_grad_(False)
    student.model.eval().requires_grad_(True)  # as distill does
    # Which noise algebra it is makes no difference to the bytes.
    with meta:
        step = ICMD(teacher, student, heads, matches, VPrediction(), settings, meta)
    of_task = [player.module.requires_grad_(False) for player in step.task.players()]
    batch = {"latents": torch.zeros(latents.shape), **{CONDITION + name: value for name, value in condition.items()}}
    position = settings.discriminator.warmup_steps + settings.discriminator.ramp_steps + 1
    recomputed = Recomputed()
    if settings.checkpointing:
        for denoiser in (teacher, student):
            with denoiser.checkpointed():  # refuses a class that has none
                pass
            denoiser.model.enable_gradient_checkpointing(recomputed)
    with AsOnAccelerator(settings.loop.precision != "fp32"):
        state = step.prepare(step.draw(batch, torch.Generator().manual_seed(0)), position)
        weights = itertools.chain(*(module.parameters() for module in (teacher.model, student.model, heads, *of_task)))
        saved = saved_storages(lambda: step.student_loss(state), weights)
    activations = total_bytes(storages_of(state) | saved | recomputed.kept) + recomputed.largest

    of_teacher, of_student, of_heads = (_count(module) for module in (teacher.model, student.model, heads))
    of_judges = sum(map(_count, of_task))
    trained = of_student + (of_heads if settings.mca_weight > 0 else 0) + of_judges
    return {
        "teacher_weights": WEIGHT * of_teacher,
        "student_weights": WEIGHT * of_student,
        "discriminator_weights": WEIGHT * (of_heads + of_judges),
        "gradients": WEIGHT * trained,
        "optimizer": 2 * WEIGHT * trained,
        "ema": WEIGHT * trained,
        "activations": activations,
    }


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
