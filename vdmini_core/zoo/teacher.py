"""Trains the zoo's teachers, each with its own class's recipe; and the small U-Net in SVD's layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vdmini_core.diffusion.process import Process, like
from vdmini_core.models import Condition, Denoiser, Pipeline
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import EncodeSettings, LoopSettings
from vdmini_core.training.distributed import Batch, State
from vdmini_core.training.loop import train
from vdmini_core.training.player import MakeOptimizer, Player, adamw
from vdmini_core.zoo.clips import ClipSet, to_model_range

LEVELS = 0.0, 1.4
"""Mean and deviation of ln(sigma) of the training levels."""
UNTOLD_SHARE = 0.1


def new_unet() -> UNetSpatioTemporalConditionModel:
    """Four stages in SVD's layout; 16 x 16 latents, so grids of 16, 8, 4 and 2.

    Every attention starts as the identity, so that one opened late changes nothing at first.
    """
    unet = UNetSpatioTemporalConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64, 64, 64),
        num_attention_heads=(1, 2, 2, 2),
        cross_attention_dim=64,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=8,
    )
    for name, module in unet.named_modules():
        if name.endswith("proj_out") and "attentions" in name:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


@dataclass(frozen=True)
class LatentSet:
    """Encoded clips: latents [N, C, T, h, w], the condition's tensors, clips first, and weights.

    `weights` [N, 1, T, h, w] scales the loss place by place.
    """

    latents: Tensor
    condition: Condition
    weights: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def first(self, count: int) -> "LatentSet":
        """The first `count` clips."""
        condition = {name: value[:count] for name, value in self.condition.items()}
        return LatentSet(self.latents[:count], condition, self.weights[:count])

    def shuffled(self, step: int, settings: LoopSettings) -> Batch:
        """Which clips make the batch of a training step; every epoch has its own order."""
        epoch, position = divmod(step, len(self) // settings.batch_size)
        g = torch.Generator().manual_seed(settings.seed * 7919 + epoch)
        order = torch.randperm(len(self), generator=g)
        chosen = order[position * settings.batch_size : (position + 1) * settings.batch_size]
        return {"ids": chosen.tolist(), "chosen": chosen}


def encode_set(
    clips: ClipSet,
    captions: Sequence[str],
    pipeline: Pipeline,
    seed: int,
    foreground_weight: float,
    track: Track = silent_track,
) -> LatentSet:
    """Encode clips and what is told of them, as the encode stage does with its defaults."""
    generator = torch.Generator().manual_seed(seed)
    latents: list[Tensor] = []
    told: list[Condition] = []
    starts = range(0, len(clips), 32)
    for start in track(starts, "encode", len(starts)):
        pixels = to_model_range(clips.pixels[start : start + 32])
        latents.append(pipeline.encode(pixels).cpu())
        told.append(pipeline.condition(pixels[:, :, 0], captions[start : start + 32], EncodeSettings(), generator))
    condition = {name: torch.cat([part[name].cpu() for part in told]) for name in told[0]}
    weights = foreground_weights(clips, tuple(latents[0].shape[2:]), foreground_weight)
    return LatentSet(torch.cat(latents), condition, weights)


def joined(one: LatentSet, other: LatentSet) -> LatentSet:
    """The clips of two sets."""
    condition = {name: torch.cat([value, other.condition[name]]) for name, value in one.condition.items()}
    return LatentSet(torch.cat([one.latents, other.latents]), condition, torch.cat([one.weights, other.weights]))


def save_set(data: LatentSet, file: Path) -> None:
    """Write the set to one safetensors file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".partial")
    tensors = {"latents": data.latents, "weights": data.weights}
    tensors |= {f"condition.{name}": value for name, value in data.condition.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, draft)
    draft.rename(file)


def load_set(file: Path) -> LatentSet:
    """Read what `save_set` wrote."""
    tensors = load_file(file)
    condition = {name.removeprefix("condition."): v for name, v in tensors.items() if name.startswith("condition.")}
    return LatentSet(tensors["latents"], condition, tensors["weights"])


def foreground_weights(clips: ClipSet, latent_shape: tuple[int, ...], weight: float) -> Tensor:
    """Loss weights [N, 1, T, h, w] of mean 1: `weight` times as much where shape or beacon is, and next to it.

    The shape is what is saturated, the beacon what is white; the background is grey. Both cover a tenth of the
    frame, so without weights their outlines are a small part of the loss and stay blurred longest. Where fewer
    latents than frames are made, the first frame has a latent of its own.
    """
    weights = []
    for chunk in clips.pixels.split(64):
        pixels = chunk.float() / 255
        seen = ((pixels.amax(-1) - pixels.amin(-1) > 0.3) | (pixels.amin(-1) > 0.85)).float()
        if latent_shape[0] < seen.shape[1]:
            repeated = (seen.shape[1] - 1) // (latent_shape[0] - 1)
            seen = torch.cat([seen[:, :1].expand(-1, repeated, -1, -1), seen[:, 1:]], 1)
        grid = F.adaptive_max_pool3d(seen, latent_shape)
        near = F.max_pool2d(grid, 3, stride=1, padding=1)
        raw = 1 + (weight - 1) * near
        weights.append((raw / raw.mean((1, 2, 3), keepdim=True))[:, None])
    return torch.cat(weights)


@contextmanager
def closed_attention(unet: UNetSpatioTemporalConditionModel, stages: int) -> Iterator[None]:
    """Within the context the attention of the outermost `stages` down and up blocks is the identity.

    Without it the outermost stage of so small a model learns the task alone and every deeper block
    stays inert, which would make a teacher unfit for studying blocks.
    """
    blocks = [*unet.down_blocks[:stages], *unet.up_blocks[len(unet.up_blocks) - stages :]]
    attentions = [attention for block in blocks for attention in getattr(block, "attentions", ())]
    for attention in attentions:
        attention.forward = lambda hidden_states, *_, **__: (hidden_states,)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


@torch.no_grad()
def guided_answer(
    denoiser: Denoiser, x: Tensor, time: Tensor, condition: Condition, untold: Condition, scale: Tensor
) -> Tensor:
    """Classifier-free guidance with the scale [B] as LCM counts it, from 0: told + scale (told - untold).

    x and the answer are [B, C, T, h, w]; `untold`, tensors of one clip, is told where nothing is told.
    """
    both = {name: torch.cat([value, untold[name].to(value).expand_as(value)]) for name, value in condition.items()}
    told, free = denoiser(torch.cat([x, x]), time.repeat(2), both).float().chunk(2)
    return told + like(scale, x) * (told - free)


def train_teacher(
    denoiser: Denoiser,
    process: Process,
    data: LatentSet,
    settings: LoopSettings,
    device: torch.device,
    *,
    learning_rate: float = 1e-3,
    levels: tuple[float, float] = LEVELS,
    untold: Condition | None = None,
    guide: tuple[Denoiser, float] | None = None,
    make_optimizer: MakeOptimizer = adamw,
    checkpoints: Path | None = None,
    fingerprint: str = "",
    log: Log = silent_log,
    track: Track = silent_track,
) -> None:
    """Train the denoiser in place on the squared error of its velocity; ends with its averaged weights.

    `levels` are mean and deviation of ln(sigma). `untold`, tensors of one clip, is what the denoiser is told where
    it is told nothing; it takes the place of a tenth of the conditions, as classifier-free guidance needs it
    (arXiv 2207.12598). With a `guide`, a frozen network and a scale, that network's guided answers are learned
    instead of the clips' own (guidance distillation, arXiv 2210.03142), and no condition is withheld.
    """
    model: Any = denoiser.model.to(device).eval()  # dropout would draw from no generator of the step

    def batch_of(step: int, generator: torch.Generator) -> Batch:
        batch = data.shuffled(step, settings)
        x0 = data.latents[batch["chosen"]]
        sigma = process.draw(len(x0), *levels, generator)
        noise = torch.randn(x0.shape, generator=generator)
        kept = torch.rand(len(x0), generator=generator) >= UNTOLD_SHARE
        return batch | {"sigma": sigma, "noise": noise, "kept": kept}

    def prepare(batch: Batch, step: int) -> State:
        chosen, sigma, noise = batch["chosen"], batch["sigma"], batch["noise"]
        x0 = data.latents[chosen]
        condition = {name: value[chosen] for name, value in data.condition.items()}
        if untold is not None and guide is None:
            told = batch["kept"]
            condition = {name: torch.where(like(told, v), v, untold[name].cpu()) for name, v in condition.items()}
        state: State = {
            "target": process.target(x0, noise, sigma).to(device),
            "noisy": process.noised(x0, noise, sigma).to(device),
            "time": process.time(sigma).to(device),
            "condition": {name: value.to(device) for name, value in condition.items()},
            "weights": (data.weights[chosen] * like(process.velocity_weight(sigma), x0)).to(device),
        }
        if guide is not None:
            assert untold is not None
            scale = torch.full_like(sigma, guide[1]).to(device)
            state["target"] = guided_answer(guide[0], state["noisy"], state["time"], state["condition"], untold, scale)
        return state

    def loss(state: State) -> dict[str, Tensor]:
        answer = denoiser(state["noisy"], state["time"], state["condition"])
        error = (answer.float() - state["target"]).square()
        return {"total": (error * state["weights"]).mean(), "unweighted": error.mean().detach()}

    player = Player("teacher", model, loss, learning_rate, make_optimizer)
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
