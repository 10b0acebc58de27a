"""How diffusers names and calls the parts of its video U-Nets.

SVD's, ModelScope's (which VideoCrafter2 and T2V-Turbo are converted to) and AnimateDiff's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet3DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import Tensor

from vdmini_core.models.graph import Condition


@dataclass(frozen=True)
class UNetRow:
    """How one diffusers class names and calls the parts of an R-A pair.

    `parts` in forward order; the caller of `unpacked` parts takes `[0]` of their answer; `mid_tail` is the
    part that a mid block ends with.
    """

    stock: type[Any]
    parts: tuple[str, ...]
    unpacked: frozenset[str]
    mid_tail: str
    call: Callable[[Any, Tensor, Tensor, Condition], Tensor]


def _call_svd(model: Any, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """`image_latents` [B, C, h, w] join every frame; `image_embedding` [B, 1, D], `added_time_ids` [B, 3]."""
    image = condition["image_latents"][:, :, None].expand(-1, -1, latents.shape[2], -1, -1)
    sample = torch.cat([latents, image.to(latents.dtype)], 1).transpose(1, 2)
    told = condition["image_embedding"], condition["added_time_ids"]
    return model(sample, time, *told, return_dict=False)[0].transpose(1, 2)  # type: ignore[no-any-return]


def _call_text(model: Any, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """`text` [B, L, D]; `guidance` [B, W], an embedded guidance scale, where the model takes one."""
    guidance = condition.get("guidance")
    return model(latents, time, condition["text"], timestep_cond=guidance, return_dict=False)[0]  # type: ignore[no-any-return]


def _call_motion(model: Any, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """The same; this class wants the text once a frame."""
    text = condition["text"].repeat_interleave(latents.shape[2], 0)
    return _call_text(model, latents, time, {**condition, "text": text})


UNETS = (
    UNetRow(
        stock=UNetSpatioTemporalConditionModel,
        parts=("resnets", "attentions"),
        unpacked=frozenset({"attentions"}),
        mid_tail="resnets",
        call=_call_svd,
    ),
    UNetRow(
        stock=UNet3DConditionModel,
        parts=("resnets", "temp_convs", "attentions", "temp_attentions"),
        unpacked=frozenset({"attentions", "temp_attentions"}),
        mid_tail="temp_convs",
        call=_call_text,
    ),
    UNetRow(
        stock=UNetMotionModel,
        parts=("resnets", "attentions", "motion_modules"),
        unpacked=frozenset({"attentions"}),
        mid_tail="resnets",
        call=_call_motion,
    ),
)
