"""One row a VAE class: how its decoder is called, and what of it has to be known to take channels out."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
)
from torch import Tensor, nn

from vdmini_core.models.graph import answering


@dataclass(frozen=True)
class Follower:
    """A layer's side (0 outputs or norm, 1 inputs) that keeps the channels of another layer's, `times` over."""

    path: str
    side: int
    times: int
    leader: str
    leader_side: int


@dataclass(frozen=True)
class VAERow:
    """One class: `decode(model, latents [B, C, T', h, w])` as the VAE scales them -> clips [B, 3, T, H, W].

    `forward(model, latents)` calls the decoder network for a trace of its channels, within `traceable(decoder)`, where
    what hides them is simplified; `followers(decoder)` are the layers that the trace then lacks. `refused(model)` is
    why a model of the class cannot be compressed, or "".
    """

    stock: type[Any]
    decode: Callable[[Any, Tensor], Tensor]
    forward: Callable[[Any, Tensor], Tensor]
    causal: bool
    traceable: Callable[[Any], Any]
    followers: Callable[[Any], tuple[Follower, ...]] = lambda decoder: ()
    refused: Callable[[Any], str] = lambda model: ""
    after_removal: Callable[[Any], None] = lambda model: None

    def fixed(self, decoder: Any) -> list[nn.Module]:
        """Layers whose outputs stay: they are pixels."""
        return [layer for name in ("conv_out", "time_conv_out") if (layer := getattr(decoder, name, None)) is not None]


def _temporal_decode(model: Any, latents: Tensor) -> Tensor:
    frames = latents.shape[2]
    clips: Tensor = model.decode(latents.transpose(1, 2).flatten(0, 1), num_frames=frames).sample
    return clips.unflatten(0, (-1, frames)).transpose(1, 2)  # type: ignore[no-any-return]


def _temporal_forward(model: Any, latents: Tensor) -> Tensor:
    batch, _, frames = latents.shape[:3]
    flat = latents.transpose(1, 2).flatten(0, 1)
    return model.decoder(flat, torch.zeros(batch, frames, device=flat.device), frames)  # type: ignore[no-any-return]


def _frame_decode(model: Any, latents: Tensor) -> Tensor:
    clips: Tensor = model.decode(latents.transpose(1, 2).flatten(0, 1)).sample
    return clips.unflatten(0, (-1, latents.shape[2])).transpose(1, 2)  # type: ignore[no-any-return]


def _frame_forward(model: Any, latents: Tensor) -> Tensor:
    return model.decoder(latents.transpose(1, 2).flatten(0, 1))  # type: ignore[no-any-return]


@contextmanager
def _as_it_is(decoder: Any) -> Iterator[None]:
    yield


@contextmanager
def _first_frame(decoder: Any) -> Iterator[None]:
    """Wan's reshapes of frames, of q, k and v, and of norms hide channels from a trace: without them, for one frame."""

    def resampled(conv: nn.Module) -> Callable[..., Tensor]:
        return lambda x, *_, **__: conv(x.squeeze(2)).unsqueeze(2)

    with ExitStack() as stack:
        for module in decoder.modules():
            if isinstance(module, WanAttentionBlock):
                stack.enter_context(answering(module, lambda x, *_, **__: x))
            elif isinstance(module, WanResample):
                stack.enter_context(answering(module, resampled(module.resample[1])))
            elif isinstance(module, WanRMS_norm):
                stack.enter_context(answering(module, lambda x: x * 1.0))
        yield


def _wan_followers(decoder: Any) -> tuple[Follower, ...]:
    """An attention's layers follow the stream it lies in; an upsampler in time writes two frames of its input."""
    found: list[Follower] = []
    for path, module in decoder.named_modules():
        if isinstance(module, WanAttentionBlock):
            stream = f"{path.split('.')[0]}.resnets.0.conv2"
            sides = (("norm", 0, 1), ("to_qkv", 0, 3), ("to_qkv", 1, 1), ("proj", 0, 1), ("proj", 1, 1))
            found += [Follower(f"{path}.{name}", side, times, stream, 0) for name, side, times in sides]
        elif isinstance(module, WanResample) and hasattr(module, "time_conv"):
            leader = f"{path}.resample.1"
            found += [Follower(f"{path}.time_conv", side, 2 - side, leader, 1) for side in (0, 1)]
    return tuple(found)


def _wan_refused(model: Any) -> str:
    if model.config.is_residual:
        return "its shortcuts repeat channels (is_residual, Wan 2.2's); Wan 2.1's does not"
    return ""


def _count_convolutions(model: Any) -> None:
    """Diffusers keeps a cache a causal convolution, and has counted them when the model was made."""
    model._cached_conv_counts["decoder"] = sum(isinstance(m, WanCausalConv3d) for m in model.decoder.modules())


VAES = (
    VAERow(AutoencoderKLTemporalDecoder, _temporal_decode, _temporal_forward, causal=False, traceable=_as_it_is),
    VAERow(AutoencoderKL, _frame_decode, _frame_forward, causal=False, traceable=_as_it_is),
    VAERow(
        AutoencoderKLWan,
        decode=lambda model, latents: model.decode(latents).sample,
        forward=lambda model, latents: model.decoder(latents[:, :, :1]),
        causal=True,
        traceable=_first_frame,
        followers=_wan_followers,
        refused=_wan_refused,
        after_removal=_count_convolutions,
    ),
)
