"""Consistency training: one answer for a clip at all levels of an ODE solver (Song et al., arXiv 2303.01469).

Latent consistency models (LCM, arXiv 2310.04378) and T2V-Turbo-v2 were distilled with a base model as the solver.
The teacher here is such a few-step model itself and its base is not at hand, so the neighbouring level is reached
with the clip's own noise instead, Song et al.'s algorithm 3. Its target is the student as it is, not an average, as
Song and Dhariwal advise (arXiv 2310.14189).

The student is told guidance as its condition has it: one scale for all clips (`encode.guidance`) and, where the
model embeds it, motion guidance 0. What guidance changes comes from the teacher through ICD and MCA alone: the clips
of a data set know none.
"""

from typing import Any

import torch
from torch import Tensor

from vdmini_core.distillation.losses import pseudo_huber_loss
from vdmini_core.distillation.task_losses.base import TaskLoss
from vdmini_core.training.distributed import Batch, Losses, State


class Consistency(TaskLoss):
    """The student's x0 at one of the solver's levels against its x0 at the next lower one, at last the clip."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.levels = self.process.solver_levels(self.settings.consistency.steps)
        self.lower = torch.cat([torch.zeros(1, device="cpu"), self.levels[:-1]])

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        level = torch.randint(len(self.levels), (count,), generator=generator)
        return {"sigma": self.levels[level], "lower": self.lower[level]}

    def prepare(self, batch: Batch, state: State, answer: Tensor | None) -> State:
        lower = batch["lower"].to(self.device)
        noisy = self.process.noised(batch["latents"], batch["noise"], batch["lower"]).to(self.device)
        # A network is not asked at level 0; whatever it answers there means its input.
        told = self.process.time(lower.clamp_min(self.levels[0].item()))
        below = self.student(noisy, told, state["condition"]).float()
        return {"target": self.process.clean(below, noisy, lower)}

    def loss(self, answer: Tensor, fake: list[Tensor], state: State) -> Losses:
        x0 = self.process.clean(answer.float(), state["noisy"], state["sigma"])
        return {"task": pseudo_huber_loss(x0, state["target"])}
