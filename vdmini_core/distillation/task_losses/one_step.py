"""Adversarial training of a model that needs one step (SF-V, Zhang et al., arXiv 2406.04324).

The student maps a clip with much noise to a clip. Heads on the frozen encoder of the teacher, one spatial and one
temporal a stage, tell its clips from real ones, both noised anew; it is also held to the clip it was given.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from vdmini_core.distillation.heads import Discriminator, discriminator_losses, verdict
from vdmini_core.distillation.losses import generator_hinge_loss, pseudo_huber_loss
from vdmini_core.distillation.taps import renoised_features
from vdmini_core.distillation.task_losses.base import TaskLoss
from vdmini_core.training.distributed import Batch, Losses, State
from vdmini_core.training.player import Player


class OneStep(TaskLoss):
    """Reconstruction of the clip from high levels of noise, and a hinge game about real clips.

    These heads are not those of the MCA loss, which compare the student with the teacher.
    """

    adversarial: ClassVar = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        assert self.teacher is not None
        self.heads = Discriminator(self.teacher.encoder_widths()).to(self.device)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        own = self.settings.one_step
        return {"sigma": self.process.draw(count, own.sigma_mean, own.sigma_std, generator)}

    def prepare(self, batch: Batch, state: State, answer: Tensor | None) -> State:
        assert self.teacher is not None
        clips = batch["latents"].to(self.device)
        return {"clips": clips, "clip_features": renoised_features(self.teacher, self.process, clips, state)}

    def loss(self, answer: Tensor, fake: list[Tensor], state: State) -> Losses:
        x0 = self.process.clean(answer.float(), state["noisy"], state["sigma"])
        reconstruction = pseudo_huber_loss(x0, state["clips"])
        with torch.set_grad_enabled(state["ramp"] > 0):
            adversarial = generator_hinge_loss(verdict(self.heads, fake, state))
        task = reconstruction + self.settings.one_step.adversarial_weight * state["ramp"] * adversarial
        return {"task": task, "reconstruction": reconstruction, "adversarial": adversarial}

    def heads_loss(self, state: State) -> Losses:
        """Hinge on the clips of the data set and those that the student's turn left behind."""
        return discriminator_losses(self.heads, state["fake"], state["clip_features"], state)

    def players(self) -> list[Player]:
        return [Player("task_discriminator", self.heads, self.heads_loss, self.settings.discriminator.learning_rate)]
