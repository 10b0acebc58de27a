"""Discriminator heads of the multi-frame content adversarial loss: one spatial, one temporal a stage.

They read features of the frozen teacher encoder, as in SF-V (arXiv 2406.04324) and LADD; each is told
the noise level sigma' at which the clip was re-noised.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vdmini_core.distillation.losses import discriminator_hinge_loss
from vdmini_core.training.distributed import Losses, State

NOISE_FEATURES = 32


class Head(nn.Module):
    """Logits for every place of features [B, C, T, h, w]; the kernel decides what it can compare."""

    def __init__(self, channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        groups = math.gcd(channels, 8)
        self.norm = nn.GroupNorm(groups, channels)
        self.first = nn.Conv3d(channels, channels, kernel, padding=padding)
        self.noise = nn.Linear(NOISE_FEATURES, channels)
        self.middle_norm = nn.GroupNorm(groups, channels)
        self.second = nn.Conv3d(channels, channels, kernel, padding=padding)
        self.logits = nn.Conv3d(channels, 1, 1)

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        hidden = self.first(self.norm(features)) + self.noise(noise)[:, :, None, None, None]
        hidden = self.second(nn.functional.silu(self.middle_norm(hidden)))
        return self.logits(nn.functional.silu(hidden))  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """A SpatioHead (3 x 3 within a frame) and a TemporalHead (3 frames at one place) after each stage."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.spatial = nn.ModuleList(Head(c, (1, 3, 3)) for c in channels)
        self.temporal = nn.ModuleList(Head(c, (3, 1, 1)) for c in channels)

    def forward(self, features: Sequence[Tensor], c_noise: Tensor) -> list[Tensor]:
        """Logits of every head for stage features [B, C, T, h, w]; c_noise = ln(sigma') / 4, [B]."""
        frequencies = 2.0 ** torch.arange(NOISE_FEATURES // 2, device=c_noise.device).div(4)
        angles = c_noise[:, None].float() * frequencies
        noise = torch.cat([angles.cos(), angles.sin()], 1)
        # A transformer's features have their channels last, which crash GroupNorm's backward pass (CPU, torch 2.13).
        plain = [stage.contiguous() for stage in features]
        stages = list(zip(plain, self.spatial, self.temporal, strict=True))
        return [head(f, noise) for f, spatial, temporal in stages for head in (spatial, temporal)]


def verdict(heads: Discriminator, features: Sequence[Tensor], state: State) -> list[Tensor]:
    """The logits of clips that were noised anew to the step's sigma'."""
    return heads(features, state["heads_sigma"].log() / 4)  # type: ignore[no-any-return]


def discriminator_losses(heads: Discriminator, fake: Sequence[Tensor], real: Sequence[Tensor], state: State) -> Losses:
    """The heads' side of the hinge game, and the gap between their logits."""
    fakes, reals = verdict(heads, fake, state), verdict(heads, real, state)
    gap = torch.stack([(r.float().mean() - f.float().mean()) for f, r in zip(fakes, reals, strict=True)]).mean()
    return {"total": discriminator_hinge_loss(fakes, reals), "real_minus_fake": gap.detach()}
