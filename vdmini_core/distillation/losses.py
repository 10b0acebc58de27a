"""The terms of the ICMD objective as pure functions (arXiv 2411.18375, section 4).

L_total = L_task + lambda_ICD * L_ICD + lambda_MCA * L_MCA; what L_task is made of depends on the task.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vdmini_core.diffusion.process import like

HUBER = 1e-3
"""Errors of latents far below count squared, those above by their size (LCM, arXiv 2310.04378)."""


def denoising_loss(answer: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error of what the network answers (v, epsilon or velocity) [B, C, T, h, w], `weight` [B].

    With `Process.velocity_weight` every process pays alike for an error of its velocity.
    """
    error = (answer.float() - target.float()).square()
    return (error * like(weight, error)).mean()


def pseudo_huber_loss(x0: Tensor, target: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Pseudo-Huber distance of two answers [B, C, T, h, w], `weights` [B, 1, T, h, w] place by place."""
    distance = ((x0 - target).square() + HUBER**2).sqrt() - HUBER
    return (distance * weights).mean()


def individual_content_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, normalised: bool = False
) -> Tensor:
    """L_ICD = sum_l E[ d(f_l_student, f_l_teacher) ] over matched taps, d the mean squared difference.

    Features have the frames folded into the batch, [B * T, C, h, w], so every frame is compared with
    its own counterpart only: content, not motion. `normalised` divides d by the variance of the teacher's
    features of the tap, without which the taps with the largest activations have the sum to themselves. It is the
    variance over the clips at hand, so this term alone is not quite the mean of what parts of a batch have.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"{len(student)} student taps against {len(teacher)} teacher taps")
    pairs = zip(student, teacher, strict=True)
    terms = [(s.float(), t.detach().float()) for s, t in pairs]
    return torch.stack([F.mse_loss(s, t) / (t.var().clamp_min(1e-12) if normalised else 1.0) for s, t in terms]).sum()


def discriminator_hinge_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """D's side of L_MCA: mean over heads of E[max(0, 1 + D(fake))] + E[max(0, 1 - D(real))].

    2.0 is chance (all logits 0), 0 is a discriminator that has won.
    """
    pairs = zip(fake, real, strict=True)
    terms = [F.relu(1 + f.float()).mean() + F.relu(1 - r.float()).mean() for f, r in pairs]
    return torch.stack(terms).mean()


def generator_hinge_loss(fake: Sequence[Tensor]) -> Tensor:
    """The student's side of L_MCA: mean over heads of -E[D(fake)]."""
    return torch.stack([-logits.float().mean() for logits in fake]).mean()
