"""Trains the zoo's evaluator and measures its corruption table."""

import io
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder
from torch import Tensor
from torch.nn import functional as F

from vdmini_core.data.video import read_clip, write_video
from vdmini_core.evaluation.evaluator import Evaluator, accuracies, load_evaluator
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.distributed import Batch, State
from vdmini_core.training.loop import train
from vdmini_core.training.player import Player
from vdmini_core.zoo.clips import FRAMES, SIZE, ClipSet, render_set, to_model_range

TRAINING_SEEDS, TEST_SEED = (5, 6, 7), 77


def compress(clips: ClipSet, seed: int, quantisers: tuple[int, int] = (2, 12)) -> ClipSet:
    """Encode and decode every clip as MPEG-4 with a quantiser drawn uniformly from the range."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(quantisers[0], quantisers[1], endpoint=True, size=len(clips))
    with ProcessPoolExecutor(2) as pool:
        pixels = list(pool.map(_compress_one, clips.pixels.numpy(), chosen.tolist(), chunksize=64))
    return replace(clips, pixels=torch.from_numpy(np.stack(pixels)))


def _compress_one(clip: np.ndarray, quantiser: int) -> np.ndarray:
    buffer = io.BytesIO()
    write_video(buffer, clip, fps=8, codec="mpeg4", crf=quantiser, container="avi")
    buffer.seek(0)
    return read_clip(buffer, frames=len(clip), fps=None, size=clip.shape[1])


@torch.no_grad()
def reconstruct(clips: ClipSet, vae: AutoencoderKLTemporalDecoder) -> ClipSet:
    """Pass every clip through the VAE: what generated clips look like at best."""
    outputs = []
    for chunk in clips.pixels.split(2):  # large chunks fall out of the cache
        x = to_model_range(chunk).to(vae.device).transpose(1, 2)
        frames = x.flatten(0, 1)
        y = vae.decode(vae.encode(frames).latent_dist.mode(), num_frames=x.shape[1]).sample
        y = y.clamp(-1, 1).unflatten(0, x.shape[:2]).movedim(2, -1)
        outputs.append(((y + 1) * 127.5).round().to(torch.uint8).cpu())
    return replace(clips, pixels=torch.cat(outputs))


def evaluator_clips(vae: AutoencoderKLTemporalDecoder) -> list[ClipSet]:
    """Training clips whose beacons tell nothing: clean, compressed and reconstructed."""
    clean, compressed, reconstructed = (
        render_set(count, seed, frames=FRAMES, size=SIZE, random_beacon=True)
        for count, seed in zip((4320, 4320, 2160), TRAINING_SEEDS, strict=True)
    )
    return [clean, compress(compressed, seed=6), reconstruct(reconstructed, vae)]


def train_evaluator(
    variants: list[ClipSet],
    settings: LoopSettings,
    device: torch.device,
    log: Log = silent_log,
    track: Track = silent_track,
) -> Evaluator:
    """Cross-entropy on both branches over clips of all variants (clean, compressed, reconstructed).

    Half of each batch gets Gaussian noise of up to 0.15 (pixels in [-1, 1]).
    """
    torch.manual_seed(settings.seed)
    evaluator = Evaluator().to(device)

    def batch_of(step: int, generator: torch.Generator) -> Batch:
        g = torch.Generator().manual_seed(settings.seed * 7919 + step)
        clips = variants[step % len(variants)]
        ids = torch.randint(len(clips), (settings.batch_size,), generator=g)
        x = to_model_range(clips.pixels[ids])
        strength = torch.rand(len(x), generator=generator) * 0.15
        strength *= torch.rand(len(x), generator=generator) < 0.5
        x = x + strength[:, None, None, None, None] * torch.randn(x.shape, generator=generator)
        return {"ids": ids.tolist(), "clips": x, "labels": clips.labels[ids], "beacons": clips.beacons[ids]}

    def prepare(batch: Batch, step: int) -> State:
        return {name: batch[name].to(device) for name in ("clips", "labels", "beacons")}

    def loss(state: State) -> dict[str, Tensor]:
        judged, labels = evaluator(state["clips"]), state["labels"]
        answers = {
            "shape": (judged.shape_logits.float(), labels[:, 0]),
            "colour": (judged.colour_logits.float(), labels[:, 1]),
            "beacon": (judged.beacon_logits.float(), state["beacons"]),
            "motion": (judged.motion_logits.float(), labels[:, 2]),
        }
        total = torch.stack([F.cross_entropy(logits, wanted) for logits, wanted in answers.values()]).sum()
        right = {name: (logits.argmax(1) == wanted).float().mean() for name, (logits, wanted) in answers.items()}
        return {"total": total, **right}

    player = Player("evaluator", evaluator, loss, 3e-3)
    train([player], batch_of, prepare, settings, device=device, log=log, track=track)
    player.finish()
    return evaluator


def corrupt(clips: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Damage clips [B, 3, T, H, W] in one known way; `none` returns them as they are."""
    match name:
        case "none":
            return clips
        case "blur":
            frames = clips.permute(0, 2, 3, 4, 1).numpy()
            blurred = [[cv2.GaussianBlur(frame, (0, 0), 5.0) for frame in clip] for clip in frames]
            return torch.from_numpy(np.array(blurred)).permute(0, 4, 1, 2, 3)
        case "shuffle":
            order = torch.stack([torch.randperm(clips.shape[2], generator=generator) for _ in clips])
            return torch.stack([clip[:, o] for clip, o in zip(clips, order, strict=True)])
        case "freeze":
            return clips[:, :, :1].expand_as(clips).contiguous()
        case "reverse":
            return clips.flip(2)
        case "slow":
            return clips[:, :, torch.arange(clips.shape[2]) // 4]
        case "noise":
            return clips + 0.15 * torch.randn(clips.shape, generator=generator)
        case _:
            raise ValueError(f"unknown corruption {name!r}; expected one of {', '.join(CORRUPTIONS)}")


CORRUPTIONS = ("none", "blur", "shuffle", "freeze", "reverse", "slow", "noise")


def corruption_table(evaluator_folder: Path, vae: AutoencoderKLTemporalDecoder) -> dict[str, dict[str, float]]:
    """Content and motion accuracy on 1,080 held-out encoded clips, whole and damaged."""
    evaluator = load_evaluator(evaluator_folder)
    test = compress(render_set(1080, TEST_SEED, frames=FRAMES, size=SIZE), seed=8, quantisers=(3, 3))
    table = {name: _accuracy(evaluator, test, name) for name in CORRUPTIONS}
    table["through the VAE"] = _accuracy(evaluator, reconstruct(test, vae), "none")
    return table


@torch.no_grad()
def _accuracy(evaluator: torch.nn.Module, clips: ClipSet, corruption: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    right = []
    for pixels, labels in zip(clips.pixels.split(64), clips.labels.split(64), strict=True):
        damaged = corrupt(to_model_range(pixels), corruption, generator)
        right.append(torch.stack(accuracies(evaluator(damaged), labels), 1))
    content, motion = torch.cat(right).float().mean(0).tolist()
    return {"content_accuracy": round(content, 4), "motion_accuracy": round(motion, 4)}
