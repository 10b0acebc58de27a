"""A data set of one clip, for which the perfect answer of a network is known."""

from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from vdmini_core.diffusion.process import EpsilonPrediction, like
from vdmini_core.models import Condition

PROCESS = EpsilonPrediction(
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
)
SHAPE = (4, 2, 3, 3)


class Toy:
    """Answers the noise that an x0 of `text` times its gain at this time leaves of its input; told `text` [B, 1, 1]."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model or nn.ParameterDict({"gain": nn.Parameter(torch.ones(1000))})
        self.told: list[SimpleNamespace] = []

    def __call__(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.told.append(SimpleNamespace(time=time, **condition))
        x0 = like(self.model["gain"][time] * condition["text"].flatten(), latents)
        a, b = PROCESS.shares(like(PROCESS.sigmas[time], latents))
        return (latents - a * x0) / b


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
