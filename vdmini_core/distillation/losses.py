"""The terms of the ICMD objective as pure functions (arXiv 2411.18375, section 4).

L_total = L_task + lambda_ICD * L_ICD + lambda_MCA * L_MCA.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def task_loss(answer: Tensor, target: Tensor) -> Tensor:
    """L_task: mean squared error of what the network answers (v, epsilon or velocity) [B, C, T, h, w]."""
    return F.mse_loss(answer.float(), target.float())


def individual_content_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """L_ICD = sum_l E[ d(f_l_student, f_l_teacher) ] over matched taps, d the mean squared difference.

    Features have the frames folded into the batch, [B * T, C, h, w], so every frame is compared with
    its own counterpart only: content, not motion.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"{len(student)} student taps against {len(teacher)} teacher taps")
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(s.float(), t.detach().float()) for s, t in pairs]).sum()


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
