"""What each unit of a VAE decoder, and each resolution's channels, are worth and cost, on clips of the encode cache.

Damage is the mean squared difference of pixels to the original decoder's clips of the same latents; nothing is trained.
"""

import math

import torch
from torch import Tensor

from vdmini_core.artifacts import ChannelScore, DecoderPart, DecoderSensitivity, Reconstruction
from vdmini_core.evaluation.decoder_costs import count_decoder, measure_decoders, part_parameters, parts_of
from vdmini_core.evaluation.metrics.dynamics import flicker
from vdmini_core.evaluation.metrics.pixels import pixel_measures
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.pruning.decoder_channels import DecoderChannels, decoder_channels
from vdmini_core.reporting import Track, silent_track

SHARES = (1.0, 0.75, 0.5, 0.375, 0.25)
"""Of the channels, at which decoders are timed and damages measured; a plan chooses among them."""


@torch.no_grad()
def clips_of(decoder: VAEDecoder, latents: Tensor) -> Tensor:
    """Latents [B, C, T', h, w] -> clips [B, 3, T, H, W] in [-1, 1], one by one."""
    return torch.cat([decoder(clip) for clip in latents.split(1)]).float().clamp(-1, 1)


def reconstruction(clips: Tensor, others: Tensor) -> Reconstruction:
    """Clips [B, 3, T, H, W] in [-1, 1] beside others, means over clips."""
    found = pixel_measures(clips, others)
    return Reconstruction(
        psnr=found["psnr"].mean().item(), ssim=found["ssim"].mean().item(), flicker=flicker(clips).mean().item()
    )


def decoder_sensitivity(
    decoder: VAEDecoder, latents: Tensor, *, runs: int, track: Track = silent_track
) -> DecoderSensitivity:
    """Bypass every unit that can go, narrow every resolution to each of SHARES; time decoders of those shares.

    `latents` [B, C, T', h, w] are real ones, on the decoder's device; one of them is timed.
    """
    original = clips_of(decoder, latents)
    channels = decoder_channels(decoder)
    damages: dict[str, tuple[float, Reconstruction]] = {}
    for name in track(decoder.removable, "bypass of the decoder's units", len(decoder.removable)):
        with decoder.bypass([name]):
            clips = clips_of(decoder, latents)
        damages[name] = _damage(clips, original), reconstruction(clips, original)
    levels = [(level, share) for level in range(decoder.levels) for share in SHARES[1:]]
    scores = [
        ChannelScore(
            level=level, share=share, damage=_damage(clips_of(_narrow(channels, level, share), latents), original)
        )
        for level, share in track(levels, "fewer channels at one resolution", len(levels))
    ]
    timed = {str(share): channels.narrowed((share,) * decoder.levels) for share in SHARES}
    latencies = measure_decoders(timed, latents[:1], runs=runs)
    _, flops = count_decoder(decoder, (1, *latents.shape[1:]))
    parameters = part_parameters(decoder)
    parts = [
        DecoderPart(
            name=name,
            parameters=parameters[name],
            flops=flops[name],
            time_ms={share: found.parts[name] for share, found in latencies.items()},
            damage=damages[name][0] if name in damages else None,
            alone=damages[name][1] if name in damages else None,
        )
        for name in parts_of(decoder)
    ]
    return DecoderSensitivity(
        shape=(1, *latents.shape[1:]),
        whole_ms={share: found.whole_ms for share, found in latencies.items()},
        parts=tuple(parts),
        channels=tuple(scores),
        flicker=flicker(original).mean().item(),
    )


def _narrow(channels: DecoderChannels, level: int, share: float) -> VAEDecoder:
    return channels.narrowed([share if at == level else 1.0 for at in range(channels.decoder.levels)])


def _damage(clips: Tensor, original: Tensor) -> float:
    damage = (clips - original).square().mean().item()
    return damage if math.isfinite(damage) else float(original.square().mean()) * 4


def sensitivity_table(found: DecoderSensitivity) -> str:
    """The measurements as a markdown page."""
    lines = [
        "| without | PSNR dB | SSIM | flicker (1 is the original's) | parameters | GFLOPs | ms |",
        "|---" * 7 + "|",
    ]
    for part in found.parts:
        alone = part.alone
        cells = ["stays", "", ""]
        if alone is not None:
            cells = [f"{alone.psnr:.2f}", f"{alone.ssim:.4f}", f"{alone.flicker / max(found.flicker, 1e-9):.2f}"]
        lines.append(
            f"| {part.name} | {' | '.join(cells)} | {part.parameters:,} | {part.flops / 1e9:.3f} "
            f"| {part.time_ms[str(SHARES[0])]:.2f} |"
        )
    levels = sorted({score.level for score in found.channels})
    lines += ["", f"| resolution: PSNR dB with a share of its channels | {' | '.join(map(str, SHARES[1:]))} |"]
    lines += ["|---" * len(SHARES) + "|"]
    for level in levels:
        psnr = [f"{psnr_of(score.damage):.2f}" for score in found.channels if score.level == level]
        lines.append(f"| U.{level} | {' | '.join(psnr)} |")
    return "\n".join(lines) + "\n"


def psnr_of(damage: float) -> float:
    """dB of a mean squared difference of pixels in [-1, 1]."""
    return 10 * math.log10(4 / max(damage, 1e-10))
