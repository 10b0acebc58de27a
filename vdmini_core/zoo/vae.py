"""Trains the zoo's VAEs, with SVD's, Stable Diffusion's or Wan's class.

SVD's and Wan's make one latent of 4 x 4 pixels, and of every frame one; Stable Diffusion's has its real factor, 8 x 8.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from vdmini_core.models.vae_facts import vae_facts
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.distributed import Batch, State
from vdmini_core.training.loop import train
from vdmini_core.training.player import Player
from vdmini_core.zoo.clips import ClipSet, to_model_range

WINDOW = {"AutoencoderKLTemporalDecoder": 4, "AutoencoderKL": 4, "AutoencoderKLWan": 5}
"""Frames of a training window; Wan's causal VAE takes 4 k + 1."""
KL_WEIGHT = 1e-4
FRAME_CHANNELS, CAUSAL_CHANNELS = 8, 4
"""Latent channels of the text-to-video VAEs."""


def _framewise_layout(widths: tuple[int, ...], latent_channels: int) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "sample_size": 64,
        "scaling_factor": 1.0,
        "force_upcast": False,
    }


def new_temporal_vae() -> AutoencoderKLTemporalDecoder:
    """SVD's class, untrained; frames pass the temporal convolution unchanged at first."""
    vae = _quietened(AutoencoderKLTemporalDecoder(**_framewise_layout((32, 64, 64), 4)))
    conv = vae.decoder.time_conv_out
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        for channel in range(3):
            conv.weight[channel, channel, 1] = 1.0
    return vae


def new_frame_vae() -> AutoencoderKL:
    """Stable Diffusion's class, untrained."""
    layout = _framewise_layout((32, 32, 48, 48), FRAME_CHANNELS) | {"norm_num_groups": 16}
    return _quietened(AutoencoderKL(**layout, up_block_types=("UpDecoderBlock2D",) * 4))


def new_causal_vae() -> AutoencoderKLWan:
    """Wan's class without compression in time, which 2,000 steps do not learn (20 dB), untrained."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=CAUSAL_CHANNELS,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=[0.0] * CAUSAL_CHANNELS,
        latents_std=[1.0] * CAUSAL_CHANNELS,
        scale_factor_temporal=1,
        scale_factor_spatial=4,
    )
    return _quietened(vae)


def _quietened(vae: Any) -> Any:
    """Residual branches start at zero, without which 1,000 steps learn little."""
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0", ".proj")) and hasattr(module, "weight"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return vae


def train_vae(
    vae: Any,
    clips: ClipSet,
    settings: LoopSettings,
    device: torch.device,
    log: Log = silent_log,
    track: Track = silent_track,
    *,
    learning_rate: float = 2e-3,
    decoder_only: bool = False,
    checkpoints: Path | None = None,
    fingerprint: str = "",
) -> Any:
    """L1 + L2 reconstruction of short windows plus a light KL; the averaged weights, in place.

    With `decoder_only` the latents stay what they are. Else their scale is set afterwards so that what the denoiser
    sees has unit variance, as in latent diffusion: `scaling_factor`, or Wan's `latents_mean` and `latents_std` per
    channel.
    """
    torch.manual_seed(settings.seed)
    window = WINDOW[type(vae).__name__]
    vae = vae.to(device).train().requires_grad_(False)  # the loop asks for the gradients of what it trains
    facts = vae_facts({**vae.config, "_class_name": type(vae).__name__})
    assert facts is not None

    def batch_of(step: int, generator: torch.Generator) -> Batch:
        g = torch.Generator().manual_seed(settings.seed * 7919 + step)
        ids = torch.randint(len(clips), (settings.batch_size,), generator=g)
        first = int(torch.randint(clips.pixels.shape[1] - window + 1, (1,), generator=g))
        pixels = clips.pixels[ids, first : first + window]
        channels, frames, *grid = facts.latent_shape(window, *pixels.shape[2:4])
        order = (channels, frames) if isinstance(vae, AutoencoderKLWan) else (frames, channels)
        noise = torch.randn(len(ids), *order, *grid, generator=generator)
        return {"ids": ids.tolist(), "pixels": pixels, "noise": noise}

    def prepare(batch: Batch, step: int) -> State:
        images = _as_input(vae, to_model_range(batch["pixels"]).to(device))
        noise = batch["noise"].flatten(0, batch["noise"].ndim - images.ndim)  # by frames where the images are
        return {"images": images, "noise": noise.to(device)}

    def loss(state: State) -> dict[str, Tensor]:
        with torch.set_grad_enabled(not decoder_only):
            posterior = _posterior(vae, state["images"])
        latents = posterior.mean + posterior.std * state["noise"]
        output = _decoded(vae, latents, window).float()
        l1, l2 = F.l1_loss(output, state["images"]), F.mse_loss(output, state["images"])
        kl = posterior.kl().mean() / latents[0].numel()
        return {"total": l1 + 2 * l2 + KL_WEIGHT * kl, "l1": l1, "l2": l2, "kl": kl}

    player = Player("vae", vae.decoder if decoder_only else vae, loss, learning_rate)
    train(
        [player],
        batch_of,
        prepare,
        settings,
        device=device,
        checkpoints=checkpoints,
        fingerprint=fingerprint,
        log=log,
        track=track,
    )
    player.finish()
    if decoder_only:
        return vae.eval()
    with torch.no_grad():
        sample = _as_input(vae, to_model_range(clips.pixels[:64]).to(device))
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in sample.split(64)])
    if isinstance(vae, AutoencoderKLWan):
        spread = {"latents_mean": latents.mean((0, 2, 3, 4)), "latents_std": latents.std((0, 2, 3, 4))}
        vae.register_to_config(**{name: [round(v, 5) for v in values.tolist()] for name, values in spread.items()})
    else:
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def _posterior(vae: Any, images: Tensor) -> DiagonalGaussianDistribution:
    """What `encode` gives; Wan's takes four frames at a time, which without compression in time changes nothing."""
    if isinstance(vae, AutoencoderKLWan):
        return DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(images)))
    return vae.encode(images).latent_dist


def _decoded(vae: Any, latents: Tensor, frames: int) -> Tensor:
    """What `decode` gives; Wan's takes one frame at a time and cuts off what is beyond -1 and 1, with its gradient."""
    if isinstance(vae, AutoencoderKLWan):
        return vae.decoder(vae.post_quant_conv(latents))  # type: ignore[no-any-return]
    options = {"num_frames": frames} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}
    return vae.decode(latents, **options).sample  # type: ignore[no-any-return]


def _as_input(vae: Any, clips: Tensor) -> Tensor:
    """Clips [B, 3, T, H, W] as the class encodes them: whole (Wan), or frame by frame [B * T, 3, H, W]."""
    return clips if isinstance(vae, AutoencoderKLWan) else clips.transpose(1, 2).flatten(0, 1)
