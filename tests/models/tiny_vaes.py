"""A tiny random VAE of every class in VAES, and latents for it."""

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderKLWan
from torch import Tensor

from vdmini_core.models.decoder import VAEDecoder

TEMPORAL, FRAME, CAUSAL = "AutoencoderKLTemporalDecoder", "AutoencoderKL", "AutoencoderKLWan"
CLASSES = (TEMPORAL, FRAME, CAUSAL)
LEVELS = 3


def new_vae(name: str) -> Any:
    """4 pixels to a latent; the causal one makes one latent of 2 frames after the first."""
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * LEVELS, "block_out_channels": (32, 64, 64)}
    if name == TEMPORAL:
        vae = AutoencoderKLTemporalDecoder(**blocks, layers_per_block=2, scaling_factor=0.5)
    elif name == FRAME:
        up = ("UpDecoderBlock2D",) * LEVELS
        vae = AutoencoderKL(**blocks, up_block_types=up, layers_per_block=1, norm_num_groups=16, scaling_factor=0.5)
    else:
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, 0.2, -0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
            scale_factor_spatial=4,
            scale_factor_temporal=2,
        )
    for parameter in vae.parameters():
        if parameter.ndim == 1 or not parameter.any():
            torch.nn.init.normal_(parameter, 1.0, 0.2)  # norms and mixing shares that matter, none of them 1 or 0
    return vae.eval().requires_grad_(False)


def new_decoder(name: str) -> VAEDecoder:
    return VAEDecoder(new_vae(name))


def latents_of(frames: int = 3, side: int = 4, batch: int = 1, seed: int = 0) -> Tensor:
    """[B, 4, frames, side, side], for any of the classes."""
    return torch.randn(batch, 4, frames, side, side, generator=torch.Generator().manual_seed(seed))
