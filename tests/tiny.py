"""Small models, inputs and files that behave like the real ones; every function is deterministic."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vdmini_core.artifacts import LatentManifest, Provenance, write_json
from vdmini_core.data.latents import CONDITION, SHARD_CLIPS, LatentCache, write_shard
from vdmini_core.models import Condition, UNetDenoiser
from vdmini_core.zoo.build import write_fixed_parts

EVEN = (32, 32, 32, 32)
GROWING = (32, 64, 64, 64)
FRAMES, LATENT_SIZE, EMBEDDING = 4, 16, 16

PROVENANCE = Provenance(
    commit="0123456789abcdef",
    dirty=False,
    params={},
    params_digest="aa",
    inputs={},
    software={},
    machine="a test",
    created="2026-01-01T00:00:00+00:00",
)


def new_model(widths: tuple[int, ...] = EVEN) -> UNetSpatioTemporalConditionModel:
    """A random U-Net in SVD's layout of four stages."""
    torch.manual_seed(0)
    return (
        UNetSpatioTemporalConditionModel(
            sample_size=8,
            block_out_channels=widths,
            num_attention_heads=tuple(width // 32 for width in widths),
            cross_attention_dim=EMBEDDING,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            num_frames=FRAMES,
        )
        .eval()
        .requires_grad_(False)
    )


def new_unet(widths: tuple[int, ...] = EVEN) -> UNetDenoiser:
    return UNetDenoiser(new_model(widths))


def new_inputs(batch: int = 1, size: int = LATENT_SIZE, seed: int = 0) -> tuple[Tensor, Condition]:
    """Latents [B, 4, 4, size, size] and a condition for `new_unet`."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, FRAMES, size, size, generator=generator)
    condition = {
        "image_latents": torch.randn(batch, 4, size, size, generator=generator),
        "image_embedding": torch.randn(batch, 1, EMBEDDING, generator=generator),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).expand(batch, -1).contiguous(),
    }
    return latents, condition


@torch.no_grad()
def output_of(denoiser: UNetDenoiser, inputs: tuple[Tensor, Condition]) -> Tensor:
    latents, condition = inputs
    return denoiser(latents, torch.full((len(latents),), 0.3), condition)


def write_pipeline(folder: Path) -> Path:
    """A whole SVD pipeline folder: factor 4 between pixels and latents, embeddings of 16."""
    new_model().save_pretrained(folder / "unet")
    torch.manual_seed(1)
    AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.5,
        force_upcast=False,
    ).save_pretrained(folder / "vae")
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=EMBEDDING,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=224,
            patch_size=56,
        )
    ).save_pretrained(folder / "image_encoder")
    write_fixed_parts(folder)
    return folder


def write_latents(
    folder: Path, clips: int, *, size: int = LATENT_SIZE, labelled: bool = True, split: str = "test"
) -> LatentCache:
    """An encode cache of random clips whose first latent value is the clip's index."""
    names = []
    for index, start in enumerate(range(0, clips, SHARD_CLIPS)):
        count = min(SHARD_CLIPS, clips - start)
        latents, condition = new_inputs(count, size, seed=100 + index)
        latents[:, 0, 0, 0, 0] = torch.arange(start, start + count).float()
        labels = torch.zeros(count, 3, dtype=torch.long) if labelled else torch.full((count, 3), -1)
        tensors = {CONDITION + name: value for name, value in condition.items()}
        names.append(write_shard(folder, split, index, {"latents": latents, "labels": labels, **tensors}))
    manifest = LatentManifest(
        shards={split: tuple(names)},
        counts={split: clips},
        teacher_digest="t",
        data_digest="d",
        provenance=PROVENANCE,
    )
    write_json(folder / "latents.json", manifest)
    return LatentCache(folder, split)
