"""What a task adds to a step of ICMD: its noise levels, what the student is compared with, and its loss."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from vdmini_core.diffusion.process import Process
from vdmini_core.models import Denoiser
from vdmini_core.settings import DistillSettings
from vdmini_core.training.distributed import Batch, Losses, State
from vdmini_core.training.player import Player


class TaskLoss(ABC):
    """L_task of one training; trains the student, and players of its own where it has any.

    `teacher` is None where training does without it. Clips are latents [B, C, T, h, w].
    """

    adversarial: ClassVar[bool] = False
    """Whether its loss reads the frozen encoder's features of the student's clips."""

    def __init__(
        self,
        teacher: Denoiser | None,
        student: Denoiser,
        process: Process,
        settings: DistillSettings,
        device: torch.device,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.process, self.settings, self.device = process, settings, device

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Noise levels `sigma` [count] of so many clips, and what else the task draws for them; on the CPU."""
        return {"sigma": self.process.draw(count, self.settings.sigma_mean, self.settings.sigma_std, generator)}

    def prepare(self, batch: Batch, state: State, answer: Tensor | None) -> State:
        """What the losses will read beside `state`; `answer` is the teacher's, or None where no loss
        wants it. Called without gradients."""
        return {}

    @abstractmethod
    def loss(self, answer: Tensor, fake: list[Tensor], state: State) -> Losses:
        """`task`, to be minimised, and its parts, in the student's turn.

        `answer` is the student's to state["noisy"]; `fake`, for an adversarial task, are the frozen encoder's
        features of the clip that it means, without gradients until state["ramp"] rises above 0.
        """

    def players(self) -> list[Player]:
        """Who is trained besides the student."""
        return []
