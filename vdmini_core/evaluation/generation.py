"""Writes the videos that a benchmark asks for, one file each; resumable, and several processes can share the work."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import Field

from vdmini_core.artifacts import Record, read_json, write_json
from vdmini_core.data.video import UnreadableVideo, read_clip, write_video
from vdmini_core.evaluation.compare import to_frames
from vdmini_core.evaluation.protocol import Sampling
from vdmini_core.models import Pipeline
from vdmini_core.models.generating import generate_clip, read_image
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import EncodeSettings

MANIFEST = "generation.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Order:
    """One video to make. `name` is its file below the folder; `source` an image, or a video whose first frame it is."""

    name: str
    prompt: str
    seed: int
    source: Path | None = None


class GenerationManifest(Record):
    """What all videos of a folder have in common; another model or setting needs another folder."""

    model: str = Field(description="digest of the pipeline folder")
    conditioned_on: Literal["image", "text"]
    sampling: Sampling
    frames: int
    height: int
    width: int
    fps: int
    codec: str
    crf: int


class Made(Record):
    """How many videos were made now, and those that could not be, with the reason."""

    count: int
    skipped: dict[str, str]


def generate_videos(
    pipeline: Pipeline,
    orders: Sequence[Order],
    folder: Path,
    manifest: GenerationManifest,
    track: Track = silent_track,
    description: str = "generate",
) -> Made:
    """Make the videos that are not in `folder`/videos yet. One whose real video has no first frame is left out.

    A video is whole or absent, and `videos` holds nothing else: drafts lie beside it, hidden. ValueError where the
    folder was begun by another model or with other settings.
    """
    claim_folder(folder, manifest)
    videos, drafts = folder / "videos", folder / ".drafts"
    missing = [order for order in orders if not (videos / order.name).is_file()]
    told, skipped = EncodeSettings(), dict[str, str]()
    for order in track(missing, description, len(missing)):
        try:
            first = first_frame(order, manifest)
        except UnreadableVideo as error:
            skipped[order.name] = str(error)
            continue
        clip = generate_clip(
            pipeline,
            first,
            order.prompt,
            frames=manifest.frames,
            steps=manifest.sampling.steps,
            seed=order.seed,
            told=told,
        )
        target = videos / order.name
        draft = drafts / f"{hashlib.sha256(order.name.encode()).hexdigest()}{target.suffix}"
        draft.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(draft, to_frames(clip), fps=manifest.fps, codec=manifest.codec, crf=manifest.crf)
        draft.replace(target)
    return Made(count=len(missing) - len(skipped), skipped=skipped)


def claim_folder(folder: Path, manifest: GenerationManifest) -> None:
    """Write the folder's manifest, or check that it is this one."""
    path = folder / MANIFEST
    if not path.is_file():
        write_json(path, manifest)
        return
    there = read_json(path, GenerationManifest)
    if there != manifest:
        a, b = there.model_dump(mode="json"), manifest.model_dump(mode="json")
        changed = "; ".join(f"{key} was {json.dumps(a[key])}, is {json.dumps(b[key])}" for key in a if a[key] != b[key])
        raise ValueError(f"{folder} was begun with other settings ({changed}); give another folder, or these settings")


def first_frame(order: Order, manifest: GenerationManifest) -> torch.Tensor:
    """What an image-to-video model begins with, [1, 3, H, W] in [-1, 1]; blank where it is told text alone."""
    if order.source is None:
        return torch.zeros(1, 3, manifest.height, manifest.width)
    if order.source.suffix.lower() in (".jpg", ".jpeg", ".png"):
        return read_image(order.source, manifest.height, manifest.width)
    frame = read_clip(order.source, frames=1, fps=None, size=(manifest.height, manifest.width))
    return torch.from_numpy(frame).permute(0, 3, 1, 2).float() / 127.5 - 1


def shard_of(items: Sequence[T], shard: str) -> list[T]:
    """The part `i/n` of the work, i from 0: every n-th item from the i-th on."""
    index, slash, count = shard.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"a shard is given as i/n with i from 0 to n - 1, such as 0/4; got {shard!r}")
    return list(items[int(index) :: int(count)])
