"""Trains the zoo's image encoder, a small `CLIPVisionModelWithProjection`.

SVD's encoder is CLIP, trained on captions. This one learns to name what is in the first frame
(shape, colour, where the beacon stands) from its projected embedding.
"""

import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.distributed import State
from vdmini_core.zoo.clips import ClipSet, to_model_range
from vdmini_core.zoo.labels import train_labels

# The pipeline feeds 224 pixels, upsampled from 64. Averaging 4 x 4 of them loses nothing that was there.
SIDE, PATCH, POOL = 224, 28, 4
EMBEDDING = 64


def new_image_encoder(pool: int = 1) -> CLIPVisionModelWithProjection:
    """A ViT of 3 layers over 8 x 8 patches of a 224 / pool pixel image.

    Position embeddings start as large as patch embeddings: from CLIP's 0.02 the place of the beacon
    was not learned in 400 steps.
    """
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=192,
            projection_dim=EMBEDDING,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE // pool,
            patch_size=PATCH // pool,
        )
    )
    embeddings = encoder.vision_model.embeddings
    nn.init.normal_(embeddings.position_embedding.weight, std=0.7)
    nn.init.normal_(embeddings.patch_embedding.weight, std=0.02 * PATCH / 8)
    return encoder


def unpool(pooled: CLIPVisionModelWithProjection) -> CLIPVisionModelWithProjection:
    """The same function of the 224-pixel image: its patch kernel averages first what POOL averaged."""
    encoder = new_image_encoder()
    weights = pooled.state_dict()
    name = "vision_model.embeddings.patch_embedding.weight"
    weights[name] = weights[name].repeat_interleave(POOL, 2).repeat_interleave(POOL, 3) / POOL**2
    encoder.load_state_dict(weights)
    return encoder


def train_image_encoder(
    clips: ClipSet,
    settings: LoopSettings,
    device: torch.device,
    log: Log = silent_log,
    track: Track = silent_track,
) -> CLIPVisionModelWithProjection:
    """Classify first frames from the embedding; returns the averaged encoder without the heads.

    Trained on averages of 4 x 4 pixels, where a kernel has 147 inputs instead of 2,352 that say almost
    the same, and unpooled at the end: at 224 pixels the shape was learned in half of the frames only.
    """
    torch.manual_seed(settings.seed)
    images = pooled_images(clips)
    encoder = new_image_encoder(POOL)

    def noisy(chosen: Tensor, generator: torch.Generator) -> State:
        clean = images[chosen]
        return {"images": clean + 0.03 * torch.randn(clean.shape, generator=generator)}

    def embed(state: State) -> Tensor:
        return encoder(state["images"]).image_embeds  # type: ignore[no-any-return]

    train_labels(encoder, embed, EMBEDDING, noisy, clips.labels, settings, device, log, track)
    return unpool(encoder).eval().requires_grad_(False)


@torch.no_grad()
def pooled_images(clips: ClipSet) -> Tensor:
    """First frames as the pipeline's image encoder sees them, 4 x 4 pixels averaged: [N, 3, 56, 56]."""
    processor = CLIPImageProcessorPil()
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    pooled = []
    for pixels in clips.pixels[:, :1].split(64):
        images = (_resize_with_antialiasing(to_model_range(pixels)[:, :, 0], (SIDE, SIDE)) + 1) / 2
        pooled.append(F.avg_pool2d((images - mean) / std, POOL))
    return torch.cat(pooled)
