"""Trains the zoo's temporal VAE, a small `AutoencoderKLTemporalDecoder` (factor 4, 4 latent channels)."""

import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.loop import Player, State, train
from vdmini_core.zoo.clips import ClipSet, to_model_range

CLIP_FRAMES = 4
KL_WEIGHT = 1e-4


def new_vae() -> AutoencoderKLTemporalDecoder:
    """The untrained VAE. Residual branches start at zero, without which 1,000 steps learn little."""
    vae = AutoencoderKLTemporalDecoder(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        scaling_factor=1.0,
        force_upcast=False,
    )
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    conv = vae.decoder.time_conv_out
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        for channel in range(3):
            conv.weight[channel, channel, 1] = 1.0
    return vae


def train_vae(
    clips: ClipSet,
    settings: LoopSettings,
    device: torch.device,
    log: Log = silent_log,
    track: Track = silent_track,
) -> AutoencoderKLTemporalDecoder:
    """L1 + L2 reconstruction of 4-frame windows plus a light KL; returns the averaged weights.

    The scaling factor is set to 1 / std of the latents, as in latent diffusion.
    """
    torch.manual_seed(settings.seed)
    vae = new_vae().to(device).train()

    def batch_of(step: int) -> State:
        g = torch.Generator().manual_seed(settings.seed * 7919 + step)
        ids = torch.randint(len(clips), (settings.batch_size,), generator=g)
        first = int(torch.randint(clips.pixels.shape[1] - CLIP_FRAMES + 1, (1,), generator=g))
        return {"ids": ids.tolist(), "pixels": clips.pixels[ids, first : first + CLIP_FRAMES]}

    def prepare(batch: State, generator: torch.Generator, step: int) -> State:
        frames = to_model_range(batch["pixels"]).to(device).transpose(1, 2).flatten(0, 1)
        noise = torch.randn(len(frames), 4, 16, 16, generator=generator).to(device)
        return {"frames": frames, "noise": noise}

    def loss(state: State) -> dict[str, Tensor]:
        posterior = vae.encode(state["frames"]).latent_dist
        latents = posterior.mean + posterior.std * state["noise"]
        output = vae.decode(latents, num_frames=CLIP_FRAMES).sample.float()
        l1, l2 = F.l1_loss(output, state["frames"]), F.mse_loss(output, state["frames"])
        kl = posterior.kl().mean() / latents[0].numel()
        return {"total": l1 + 2 * l2 + KL_WEIGHT * kl, "l1": l1, "l2": l2, "kl": kl}

    player = Player("vae", vae, loss, 2e-3)
    train([player], batch_of, prepare, settings, device=device, log=log, track=track)
    assert player.ema is not None
    player.ema.copy_to(vae)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        sample = to_model_range(clips.pixels[:64]).to(device).transpose(1, 2).flatten(0, 1)
        latents = vae.encode(sample).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae
