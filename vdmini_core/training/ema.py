"""Exponential moving average of a module's parameters, kept in float32."""

import torch
from torch import Tensor, nn


class EMA:
    """`average <- decay_t * average + (1 - decay_t) * weight`, with decay_t = min(decay, (1+t)/(10+t)).

    The ramp lets short runs use the average too (the warm-up of TensorFlow's and diffusers' EMA).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().float().clone() for name, p in module.named_parameters()}
        self._weights = list(module.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the module's weights after optimizer step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.average.values())
        torch._foreach_lerp_(averages, [weight.detach().float() for weight in self._weights], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the averages."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])
