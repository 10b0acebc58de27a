"""Fills the encode cache: clips and what is said of them, through the teacher's VAE and encoders, once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdmini_core.artifacts import Clip, DataManifest, LatentManifest, Provenance, write_json
from vdmini_core.data.latents import CONDITION, SHARD_CLIPS, write_shard
from vdmini_core.data.ucf101 import caption_of, choose
from vdmini_core.data.video import read_clip
from vdmini_core.models import Pipeline
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import EncodeSettings


def read_batch(clips: Sequence[Clip], data: DataManifest) -> tuple[Tensor, Tensor]:
    """Decoded clips [B, 3, T, H, W] in [-1, 1] and labels [B, 3], -1 where unknown."""
    root = Path(data.root)
    pixels = [read_clip(root / c.path, frames=data.frames, fps=data.fps, size=data.size) for c in clips]
    labels = torch.tensor([clip.label or (-1, -1, -1) for clip in clips])
    return torch.from_numpy(np.stack(pixels)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1, labels


def encode_dataset(
    pipeline: Pipeline,
    data: DataManifest,
    settings: EncodeSettings,
    folder: Path,
    teacher_digest: str,
    provenance: Provenance,
    track: Track = silent_track,
) -> LatentManifest:
    """Write latents, conditions and labels of the chosen train and test clips; the manifest goes last."""
    shards: dict[str, tuple[str, ...]] = {}
    counts: dict[str, int] = {}
    for split, wanted in (("train", settings.train_clips), ("test", settings.test_clips)):
        clips = choose(data, split, wanted, settings.seed)
        starts = range(0, len(clips), SHARD_CLIPS)
        names = []
        for index, start in enumerate(track(starts, f"encode {split}", len(starts))):
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + start)
            chosen = clips[start : start + SHARD_CLIPS]
            parts = [
                _encode(pipeline, chosen[first : first + settings.batch_size], data, settings, generator)
                for first in range(0, len(chosen), settings.batch_size)
            ]
            tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            names.append(write_shard(folder, split, index, tensors))
        shards[split], counts[split] = tuple(names), len(clips)
    manifest = LatentManifest(
        shards=shards,
        counts=counts,
        teacher_digest=teacher_digest,
        data_digest=data.digest,
        provenance=provenance,
    )
    write_json(folder / "latents.json", manifest)
    return manifest


def _encode(
    pipeline: Pipeline, clips: Sequence[Clip], data: DataManifest, settings: EncodeSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    pixels, labels = read_batch(clips, data)
    condition = pipeline.condition(pixels[:, :, 0], [caption_of(clip) for clip in clips], settings, generator)
    return {
        "latents": pipeline.encode(pixels).cpu(),
        "labels": labels,
        **{CONDITION + name: value.cpu() for name, value in condition.items()},
    }
