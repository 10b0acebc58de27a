"""A tiny random U-Net of every class in UNETS, in SVD's layout of four stages, and what it is told."""

from typing import Any

import torch
from diffusers import UNet3DConditionModel, UNetMotionModel
from torch import Tensor

from tests.tiny import EVEN, new_inputs, new_unet, output_of
from vdmini_core.models import Condition, UNetDenoiser

TEXT, TOKENS, GUIDANCE = 16, 5, 8
SVD, TEXT_3D, MOTION = "UNetSpatioTemporalConditionModel", "UNet3DConditionModel", "UNetMotionModel"
CLASSES = (SVD, TEXT_3D, MOTION)


def new_unet_of(name: str, widths: tuple[int, ...] = EVEN, **changes: Any) -> UNetDenoiser:
    """A random model of the class in which every unit matters, layers that start at zero included.

    1.8 million parameters at equal widths; `changes` to the config (not SVD's). Norms have few enough groups
    for more than one value each in the innermost stage, where one value alone would be all rounding.
    """
    if name == SVD:
        return new_unet(widths)
    torch.manual_seed(0)
    shared: dict[str, Any] = {"sample_size": 8, "block_out_channels": widths, "cross_attention_dim": TEXT}
    shared["norm_num_groups"] = 8
    if name == TEXT_3D:
        shared |= {"attention_head_dim": 8, "time_cond_proj_dim": GUIDANCE}
        model = UNet3DConditionModel(**shared | changes)
    else:
        shared |= {"num_attention_heads": tuple(width // 16 for width in widths), "motion_num_attention_heads": 2}
        model = UNetMotionModel(**shared | changes)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return UNetDenoiser(model)


def inputs_of(name: str, batch: int = 1, seed: int = 0) -> tuple[Tensor, Condition]:
    """Latents [B, 4, 4, 8, 8], [B, 4, 4, 16, 16] for SVD, and the condition that a model of the class is told."""
    latents, condition = new_inputs(batch, 16 if name == SVD else 8, seed)
    if name != SVD:
        generator = torch.Generator().manual_seed(seed)
        condition = {"text": torch.randn(batch, TOKENS, TEXT, generator=generator)}
        if name == TEXT_3D:
            condition["guidance"] = torch.randn(batch, GUIDANCE, generator=generator)
    return latents, condition


def answer_of(denoiser: UNetDenoiser) -> Tensor:
    """What a denoiser of any of the classes, teacher or student, answers for fixed inputs."""
    return output_of(denoiser, inputs_of(denoiser.row.stock.__name__))
