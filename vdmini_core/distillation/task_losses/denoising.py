"""The loss that diffusion models are trained with: the answer at a random level, whatever the noise algebra.

`Process` makes it EDM's v-prediction (arXiv 2206.00364), DDPM's epsilon (arXiv 2006.11239) or flow matching
(arXiv 2210.02747).
"""

from torch import Tensor

from vdmini_core.distillation.losses import denoising_loss
from vdmini_core.distillation.task_losses.base import TaskLoss
from vdmini_core.training.distributed import Batch, Losses, State


class Denoising(TaskLoss):
    """Squared error of the answer, against the clip's own or, by `distill.target`, the teacher's."""

    def prepare(self, batch: Batch, state: State, answer: Tensor | None) -> State:
        if self.settings.target == "teacher":
            assert answer is not None
            return {"target": answer.float()}
        target = self.process.target(batch["latents"], batch["noise"], batch["sigma"])
        return {"target": target.to(self.device)}

    def loss(self, answer: Tensor, fake: list[Tensor], state: State) -> Losses:
        return {"task": denoising_loss(answer, state["target"], self.process.velocity_weight(state["sigma"]))}
