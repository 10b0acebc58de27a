"""Trains the zoo's teacher, a small `UNetSpatioTemporalConditionModel` with SVD's own recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from vdmini_core.diffusion.process import VPrediction
from vdmini_core.models.svd import SVD, added_time_ids
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import EncodeSettings, LoopSettings
from vdmini_core.training.loop import Player, State, train
from vdmini_core.zoo.clips import ClipSet, to_model_range

# What the model is told is what the encode stage tells it by default.
TOLD = EncodeSettings()
SIGMA_MEAN, SIGMA_STD = 0.0, 1.4


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
    """Encoded clips: latents [N, C, T, h, w] (scaled), image latents [N, C, h, w], embeddings [N, 1, D].

    `weights` [N, 1, T, h, w] scales the loss place by place.
    """

    latents: Tensor
    image_latents: Tensor
    embeddings: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def encode_set(
    clips: ClipSet, pipeline: SVD, seed: int, foreground_weight: float, track: Track = silent_track
) -> LatentSet:
    """Encode clips and their noise-augmented first frames, as the pipeline encodes its image."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {"latents": [], "image_latents": [], "embeddings": []}
    chunks = clips.pixels.split(32)
    for chunk in track(chunks, "encode", len(chunks)):
        pixels = to_model_range(chunk)
        told = pipeline.condition(pixels[:, :, 0], (), TOLD, generator)
        parts["latents"].append(pipeline.encode(pixels).cpu())
        parts["image_latents"].append(told["image_latents"].cpu())
        parts["embeddings"].append(told["image_embedding"].cpu())
    tensors = {name: torch.cat(chunks).contiguous() for name, chunks in parts.items()}
    weights = foreground_weights(clips, tensors["latents"].shape[-1], foreground_weight)
    return LatentSet(**tensors, weights=weights)


def foreground_weights(clips: ClipSet, latent_size: int, weight: float) -> Tensor:
    """Loss weights [N, 1, T, h, w] of mean 1: `weight` times as much where the shape is, and next to it.

    The shape is what is saturated; background and beacon are grey and white. It covers a tenth of the
    frame, so without weights its outline is a small part of the loss and stays blurred longest.
    """
    weights = []
    for chunk in clips.pixels.split(64):
        pixels = chunk.float() / 255
        saturated = (pixels.amax(-1) - pixels.amin(-1) > 0.3).float()
        grid = F.adaptive_max_pool2d(saturated, latent_size)
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


def train_teacher(
    data: LatentSet,
    settings: LoopSettings,
    device: torch.device,
    *,
    start: UNetSpatioTemporalConditionModel | None = None,
    learning_rate: float = 1e-3,
    closed_stages: int = 0,
    checkpoints: Path | None = None,
    fingerprint: str = "",
    log: Log = silent_log,
    track: Track = silent_track,
) -> UNetSpatioTemporalConditionModel:
    """EDM v-prediction (weighted so that the loss is plain MSE on v); returns the averaged weights.

    Continues from `start` where given; the attention of the outermost `closed_stages` stays shut.
    """
    torch.manual_seed(settings.seed)
    unet = (start or new_unet()).to(device).requires_grad_(True).train()
    ids = added_time_ids(TOLD).to(device)
    process = VPrediction()

    def batch_of(step: int) -> State:
        per_epoch = len(data) // settings.batch_size
        epoch, position = divmod(step, per_epoch)
        g = torch.Generator().manual_seed(settings.seed * 7919 + epoch)
        order = torch.randperm(len(data), generator=g)
        chosen = order[position * settings.batch_size : (position + 1) * settings.batch_size]
        return {"ids": chosen.tolist(), "chosen": chosen}

    def prepare(batch: State, generator: torch.Generator, step: int) -> State:
        chosen = batch["chosen"]
        x0 = data.latents[chosen]
        sigma = process.draw(len(chosen), SIGMA_MEAN, SIGMA_STD, generator)
        noise = torch.randn(x0.shape, generator=generator)
        return {
            "target": process.target(x0, noise, sigma).to(device),
            "noisy": process.noised(x0, noise, sigma).to(device),
            "time": process.time(sigma).to(device),
            "image": data.image_latents[chosen].to(device),
            "embedding": data.embeddings[chosen].to(device),
            "weights": data.weights[chosen].to(device),
        }

    def loss(state: State) -> dict[str, Tensor]:
        noisy = state["noisy"]
        image = state["image"][:, :, None].expand(-1, -1, noisy.shape[2], -1, -1)
        sample = torch.cat([noisy, image], 1).transpose(1, 2)
        output = unet(sample, state["time"], state["embedding"], ids.expand(len(noisy), -1)).sample
        error = (output.transpose(1, 2).float() - state["target"]).square()
        return {"total": (error * state["weights"]).mean(), "v_loss": error.mean().detach()}

    player = Player("teacher", unet, loss, learning_rate)
    with closed_attention(unet, closed_stages):
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
    assert player.ema is not None
    player.ema.copy_to(unet)
    return unet.eval().requires_grad_(False)
