"""Muon: momentum made orthogonal, for matrices; AdamW for all other weights.

From "Muon is Scalable for LLM Training" (arXiv 2502.16982), whose scale gives a matrix's update the root mean square of
AdamW's, 0.2, so that both take one learning rate. torch.optim.Muon refuses weights that are no matrices.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vdmini_core.settings import LoopSettings

COEFFICIENTS = 3.4445, -4.7750, 2.0315
UPDATE_RMS = 0.2
SMALLEST_SIDE = 32  # below it a weight counts as no matrix


def orthogonal(matrices: Tensor, steps: int = 5, epsilon: float = 1e-7) -> Tensor:
    """Matrices [..., M, N] with the same singular vectors and singular values near 1 (0.7 to 1.2), by Newton-Schulz."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + epsilon)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x  # type: ignore[no-any-return]


def muon(weights: list[nn.Parameter], learning_rate: float, settings: LoopSettings) -> torch.optim.Optimizer:
    """Muon with AdamW's settings, for a `Player`."""
    return Muon(weights, learning_rate, settings.betas, settings.weight_decay)


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest. Processes that have the same gradients share the work of matrices.

    Whole weights only, no sharded ones.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        momentum: float = 0.95,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.momentum, self.epsilon = momentum, epsilon

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for weight in weights:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                if weight.ndim == 2 and min(weight.shape) >= SMALLEST_SIDE:
                    shapes.setdefault(tuple(weight.shape), []).append(weight)
                else:
                    self._adam(weight, group["lr"], *group["betas"])
            for alike in shapes.values():
                self._muon(alike, group["lr"])

    def _muon(self, weights: list[nn.Parameter], lr: float) -> None:
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - self.momentum)
        here, there = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = -(-len(weights) // there)
        mine = weights[here * share : (here + 1) * share]
        updates = weights[0].new_zeros((share, *weights[0].shape), dtype=torch.bfloat16)
        if mine:
            ahead = [torch.lerp(w.grad, self.state[w]["momentum"], self.momentum) for w in mine]  # type: ignore[arg-type]
            updates[: len(mine)] = orthogonal(torch.stack(ahead).bfloat16())
        if there > 1:
            parts = [torch.empty_like(updates) for _ in range(there)]
            dist.all_gather(parts, updates)
            updates = torch.cat(parts)
        scale = UPDATE_RMS * max(weights[0].shape) ** 0.5
        for weight, update in zip(weights, updates[: len(weights)], strict=True):
            weight.add_(update.to(weight.dtype), alpha=-lr * scale)

    def _adam(self, weight: nn.Parameter, lr: float, beta1: float, beta2: float) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight)}
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        taken = float(state["step"])
        state["exp_avg"].lerp_(weight.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - beta2)
        deviation = (state["exp_avg_sq"] / (1 - beta2**taken)).sqrt_().add_(self.epsilon)
        weight.addcdiv_(state["exp_avg"], deviation, value=-lr / (1 - beta1**taken))
