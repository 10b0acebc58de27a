"""Denoisers and VAE decoders with random weights and inputs, made where and as they are used: for timing alone."""

from typing import TypeVar

import torch
from torch import Tensor

from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.models.graph import Condition, Denoiser, config_of, empty
from vdmini_core.models.published import meta_inputs
from vdmini_core.models.vae_facts import LatentShape

SVD_NUMBERS = "added_time_ids"


Network = TypeVar("Network", Denoiser, VAEDecoder)


def untrained(denoiser: Network, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Network:
    """The same network (of a decoder the VAE) with weights drawn on the device in `dtype`, and made nowhere else.

    `denoiser` may be on the meta device. Matrices and kernels keep a signal's variance (normal, 1 / sqrt(fan in)),
    norms scale by 1, biases are 0. What the class keeps in float32 when it is loaded is float32 here.
    """
    model = empty(type(denoiser.model), config_of(denoiser.model))
    generator = torch.Generator(device).manual_seed(seed)
    in_float32 = set(model._keep_in_fp32_modules or ())

    def draw(name: str, shape: torch.Size) -> Tensor:
        as_loaded = torch.float32 if in_float32 & set(name.split(".")) else dtype
        tensor = torch.empty(shape, device=device, dtype=as_loaded)
        if len(shape) > 1:
            return tensor.normal_(std=shape[1:].numel() ** -0.5, generator=generator)
        return tensor.fill_(float(name.endswith("weight")))

    weights = {name: draw(name, parameter.shape) for name, parameter in model.named_parameters()}
    tables = {name: table.to(device, dtype) for name, table in model.state_dict().items() if name not in weights}
    model.load_state_dict(weights | tables, assign=True)
    model.to(device)  # tables that no checkpoint has
    return type(denoiser)(model.eval().requires_grad_(False))


def random_inputs(
    denoiser: Denoiser, shape: LatentShape, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Condition]:
    """Latents [1, C, T, h, w] and a condition for the denoiser: embeddings are normal, masks and numbers are 1.

    So every text is as long as the stock pipeline pads it. Raises ValueError as `meta_inputs` does.
    """
    generator = torch.Generator(device).manual_seed(seed)
    latents, told = meta_inputs(denoiser, shape)

    def real(name: str, like: Tensor) -> Tensor:
        if name.endswith("_mask") or name == SVD_NUMBERS or like.ndim == 1:
            return torch.ones(like.shape, device=device)
        return torch.randn(like.shape, device=device, dtype=dtype, generator=generator)

    return real("latents", latents), {name: real(name, like) for name, like in told.items()}
