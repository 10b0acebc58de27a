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
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from vdmini_core.data.synthetic import COLOURS, MOTIONS, SHAPES
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.loop import Player, State, train
from vdmini_core.zoo.clips import ClipSet, to_model_range


def new_image_encoder() -> CLIPVisionModelWithProjection:
    """A ViT of 3 layers over 8 x 8 patches; the pipeline feeds it 224-pixel images.

    Position embeddings start as large as patch embeddings: from CLIP's 0.02 the place of the beacon
    was not learned in 400 steps.
    """
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=192,
            projection_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=224,
            patch_size=28,
        )
    )
    nn.init.normal_(encoder.vision_model.embeddings.position_embedding.weight, std=0.7)
    return encoder


def train_image_encoder(
    clips: ClipSet,
    settings: LoopSettings,
    device: torch.device,
    log: Log = silent_log,
    track: Track = silent_track,
) -> CLIPVisionModelWithProjection:
    """Classify first frames from the embedding; returns the averaged encoder without the heads."""
    torch.manual_seed(settings.seed)
    processor = CLIPImageProcessor()
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    encoder = new_image_encoder().to(device)
    sizes = (len(SHAPES), len(COLOURS), len(MOTIONS))
    heads = nn.ModuleList(nn.Linear(64, size) for size in sizes).to(device)
    model = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def batch_of(step: int) -> State:
        g = torch.Generator().manual_seed(settings.seed * 7919 + step)
        ids = torch.randint(len(clips), (settings.batch_size,), generator=g)
        return {"ids": ids.tolist(), "pixels": clips.pixels[ids, :1], "labels": clips.labels[ids]}

    def prepare(batch: State, generator: torch.Generator, step: int) -> State:
        frames = to_model_range(batch["pixels"])[:, :, 0]
        frames = frames + 0.03 * torch.randn(frames.shape, generator=generator)
        images = (_resize_with_antialiasing(frames, (224, 224)) + 1) / 2
        return {"images": ((images - mean) / std).to(device), "labels": batch["labels"].to(device)}

    def loss(state: State) -> dict[str, Tensor]:
        embedding = encoder(state["images"]).image_embeds
        terms = [F.cross_entropy(h(embedding).float(), state["labels"][:, i]) for i, h in enumerate(heads)]
        right = [(h(embedding).argmax(1) == state["labels"][:, i]).float().mean() for i, h in enumerate(heads)]
        names = ("shape_accuracy", "colour_accuracy", "beacon_accuracy")
        total = terms[0] + terms[1] + terms[2]
        return {"total": total, **dict(zip(names, right, strict=True))}

    player = Player("image_encoder", model, loss, 5e-4)
    train([player], batch_of, prepare, settings, device=device, log=log, track=track)
    assert player.ema is not None
    player.ema.copy_to(model)
    return encoder.eval().requires_grad_(False)
