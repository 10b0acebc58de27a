"""Trains the zoo's teacher, a small `UNetSpatioTemporalConditionModel` with SVD's own recipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from vdmini_core.diffusion import edm
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.loop import Player, State, train
from vdmini_core.zoo.clips import ClipSet, to_model_range

# What the stock pipeline passes by default: fps 7 (told as 6), motion bucket, noise augmentation.
ADDED_TIME_IDS = (6.0, 127.0, 0.02)
NOISE_AUGMENTATION = 0.02
SIGMA_MEAN, SIGMA_STD = 0.0, 1.4


def new_unet() -> UNetSpatioTemporalConditionModel:
    """Four stages in SVD's layout; 16 x 16 latents, so grids of 16, 8, 4 and 2."""
    return UNetSpatioTemporalConditionModel(
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


@dataclass(frozen=True)
class LatentSet:
    """Encoded clips: latents [N, C, T, h, w] (scaled), image latents [N, C, h, w], embeddings [N, 1, D].

    `weights` [N, 1, T, h, w] scales the loss place by place; None weighs all alike.
    """

    latents: Tensor
    image_latents: Tensor
    embeddings: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def encode_set(
    clips: ClipSet,
    vae: AutoencoderKLTemporalDecoder,
    image_encoder: CLIPVisionModelWithProjection,
    seed: int,
    track: Track = silent_track,
) -> LatentSet:
    """Encode clips and their noise-augmented first frames, as the pipeline encodes its image."""
    processor = CLIPImageProcessor()
    generator = torch.Generator().manual_seed(seed)
    latents, image_latents, embeddings = [], [], []
    chunks = clips.pixels.split(32)
    for chunk in track(chunks, "encode", len(chunks)):
        x = to_model_range(chunk).transpose(1, 2)
        frames = x.flatten(0, 1).to(vae.device)
        z = vae.encode(frames).latent_dist.mode() * vae.config.scaling_factor
        latents.append(z.unflatten(0, x.shape[:2]).transpose(1, 2).cpu())
        first = x[:, 0]
        noisy = first + NOISE_AUGMENTATION * torch.randn(first.shape, generator=generator)
        image_latents.append(vae.encode(noisy.to(vae.device)).latent_dist.mode().cpu())
        image = (_resize_with_antialiasing(first, (224, 224)) + 1) / 2
        options: dict[str, Any] = {"do_center_crop": False, "do_resize": False, "do_rescale": False}
        image = processor(images=image, return_tensors="pt", do_normalize=True, **options).pixel_values
        embeddings.append(image_encoder(image.to(image_encoder.device)).image_embeds[:, None].cpu())
    return LatentSet(*(torch.cat(parts).contiguous() for parts in (latents, image_latents, embeddings)))


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
def dropped_skips(unet: UNetSpatioTemporalConditionModel, keep: dict[int, Tensor]) -> Iterator[None]:
    """Within the context, multiply the skips that up block i receives by keep[i], one number a sample.

    Without it the outermost stage of so small a model learns the task alone and every deeper block
    stays inert, which would make a teacher unfit for studying blocks.
    """

    def pre_hook(index: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            skips = kwargs["res_hidden_states_tuple"]
            factor = keep[index].repeat_interleave(len(skips[0]) // len(keep[index]))[:, None, None, None]
            kwargs["res_hidden_states_tuple"] = tuple(skip * factor for skip in skips)
            return args, kwargs

        return hook

    handles = [unet.up_blocks[index].register_forward_pre_hook(pre_hook(index), with_kwargs=True) for index in keep]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train_teacher(
    data: LatentSet,
    settings: LoopSettings,
    device: torch.device,
    *,
    start: UNetSpatioTemporalConditionModel | None = None,
    learning_rate: float = 1e-3,
    drop_outer: float = 0.2,
    drop_both: float = 0.3,
    checkpoints: Path | None = None,
    fingerprint: str = "",
    log: Log = silent_log,
    track: Track = silent_track,
) -> UNetSpatioTemporalConditionModel:
    """EDM v-prediction (weighted so that the loss is plain MSE on v); returns the averaged weights.

    Continues from `start` where given. Samples with sigma > 0.7 lose the skips into U.3 with
    probability `drop_outer`, those into U.3 and U.2 with probability `drop_both`: there the skips hold
    mostly noise, and the deep blocks have to carry scene and motion. Dropping ends with the last fifth
    of the steps.
    """
    torch.manual_seed(settings.seed)
    unet = (start or new_unet()).to(device).requires_grad_(True).train()
    ids = torch.tensor([ADDED_TIME_IDS], device=device)

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
        sigma = edm.draw_sigma(len(chosen), SIGMA_MEAN, SIGMA_STD, generator)
        noisy = x0 + edm.like(sigma, x0) * torch.randn(x0.shape, generator=generator)
        dice = torch.rand(len(chosen), generator=generator)
        dice = torch.where(sigma > 0.7, dice, torch.ones(()))
        if step >= 0.8 * settings.max_steps:
            dice = torch.ones_like(dice)
        return {
            "x0": x0.to(device),
            "noisy": noisy.to(device),
            "sigma": sigma.to(device),
            "image": data.image_latents[chosen].to(device),
            "embedding": data.embeddings[chosen].to(device),
            "weights": torch.ones(()) if data.weights is None else data.weights[chosen].to(device),
            "keep": {
                3: (dice >= drop_outer + drop_both).float().to(device),
                2: (dice >= drop_both).float().to(device),
            },
        }

    def loss(state: State) -> dict[str, Tensor]:
        noisy, sigma = state["noisy"], state["sigma"]
        image = state["image"][:, :, None].expand(-1, -1, noisy.shape[2], -1, -1)
        sample = torch.cat([noisy * edm.c_in(edm.like(sigma, noisy)), image], 1).transpose(1, 2)
        with dropped_skips(unet, state["keep"]):
            output = unet(sample, edm.c_noise(sigma), state["embedding"], ids.expand(len(noisy), -1)).sample.transpose(
                1, 2
            )
        target = edm.velocity(state["x0"], noisy, sigma)
        error = ((output.float() - target).square() * state["weights"]).mean((1, 2, 3, 4))
        whole = state["keep"][3] > 0
        intact = error[whole].mean() if bool(whole.any()) else error.mean()
        return {"total": error.mean(), "v_loss_intact": intact.detach()}

    player = Player("teacher", unet, loss, learning_rate)
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
