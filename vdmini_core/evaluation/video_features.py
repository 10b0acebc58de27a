"""Features of many video files: decoding overlaps extraction, few clips are in memory at a time, and work resumes."""

import json
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vdmini_core.artifacts import Record, json_digest
from vdmini_core.data.video import Frames, UnreadableVideo, frame_count, read_clip
from vdmini_core.evaluation.extractor import Extractor
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import Size, height_and_width

SHARD_CLIPS = 32
Clips = Generator[Frames | UnreadableVideo, None, None]


class ClipSpec(Record):
    """Which frames of a file are a clip, and of what size: `frames` consecutive ones at `fps` (None: the file's own).

    They begin with the file's first, or at a place that is drawn once a file from `seed`.
    """

    frames: int = 16
    size: Size = 256
    fps: float | None = None
    start: Literal["first", "random"] = "first"
    seed: int = 0


@dataclass(frozen=True)
class VideoFeatures:
    """Features [N, D] of the readable files, their names in order, and why the others were left out."""

    values: npt.NDArray[np.floating[Any]]
    names: tuple[str, ...]
    skipped: dict[str, str]


def extract_features(
    root: Path,
    names: Sequence[str],
    extractor: Extractor,
    spec: ClipSpec,
    cache: Path,
    *,
    workers: int = 2,
    batch_size: int = 8,
    track: Track = silent_track,
) -> VideoFeatures:
    """Features of the files `names` below `root`, in that order.

    Threads decode while the extractor works; at most `batch_size` and two a thread more are decoded ahead. Features
    are kept in `cache` every 32 files, under the files' names, sizes and times, the extractor and the spec, so the
    same call goes on where it was. Batches do not span these shards: the result does not depend on interruptions.
    """
    identities = [_identity(root, name) for name in names]
    key = json_digest([extractor.sha256, extractor.call, spec.model_dump(mode="json"), batch_size, identities])
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    shards = [list(names[start : start + SHARD_CLIPS]) for start in range(0, len(names), SHARD_CLIPS)]
    files = [folder / f"{index:05d}.safetensors" for index in range(len(shards))]
    wanted = [(path, shard) for path, shard in zip(files, shards, strict=True) if not path.is_file()]
    paths = [root / name for _, shard in wanted for name in shard]
    with closing(decoded(paths, spec, workers, batch_size + 2 * workers)) as stream:
        clips = track(stream, "extract features", len(paths))
        for path, shard in wanted:
            _write_shard(path, *_extract_shard(islice(clips, len(shard)), shard, extractor, batch_size))
    return _gather(files, names)


def decoded(paths: Iterable[Path], spec: ClipSpec, workers: int, ahead: int) -> Clips:
    """Each path's clip uint8 [T, H, W, 3], or what is wrong with it, in order; `ahead` are in work or waiting."""
    waiting: deque[Future[Frames | UnreadableVideo]] = deque()
    rest = iter(paths)
    pool = ThreadPoolExecutor(workers)
    try:
        waiting.extend(pool.submit(read_spec, path, spec) for path in islice(rest, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(read_spec, path, spec) for path in islice(rest, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def read_spec(path: Path, spec: ClipSpec) -> Frames | UnreadableVideo:
    """The clip of one file, or the error that says why there is none."""
    try:
        start = 0
        if spec.start == "random":
            last = frame_count(path, fps=spec.fps) - spec.frames
            draw = int(json_digest([spec.seed, path.name])[:15], 16)
            start = draw % (last + 1) if last > 0 else 0
        return read_clip(path, frames=spec.frames, fps=spec.fps, size=height_and_width(spec.size), start=start)
    except UnreadableVideo as error:
        return error


def _extract_shard(
    clips: Iterable[Frames | UnreadableVideo], names: Sequence[str], extractor: Extractor, batch_size: int
) -> tuple[list[torch.Tensor], list[str], dict[str, str]]:
    features: list[torch.Tensor] = []
    kept: list[str] = []
    skipped: dict[str, str] = {}
    batch: list[Frames] = []

    def flush() -> None:
        if batch:
            features.append(extractor(torch.from_numpy(np.stack(batch)).permute(0, 4, 1, 2, 3)))
            batch.clear()

    for name, clip in zip(names, clips, strict=True):
        if isinstance(clip, UnreadableVideo):
            skipped[name] = str(clip)
            continue
        kept.append(name)
        batch.append(clip)
        if len(batch) == batch_size:
            flush()
    flush()
    return features, kept, skipped


def _write_shard(path: Path, features: list[torch.Tensor], names: list[str], skipped: dict[str, str]) -> None:
    """Whole or absent."""
    draft = path.with_suffix(".partial")
    values = torch.cat(features) if features else torch.zeros(0, 0)
    save_file({"features": values}, draft, {"names": json.dumps(names), "skipped": json.dumps(skipped)})
    draft.replace(path)


def _gather(files: Sequence[Path], names: Sequence[str]) -> VideoFeatures:
    values: list[npt.NDArray[np.floating[Any]]] = []
    kept: list[str] = []
    skipped: dict[str, str] = {}
    for path in files:
        with safe_open(path, "numpy") as shard:
            facts: dict[str, str] = shard.metadata()
            if json.loads(facts["names"]):
                values.append(shard.get_tensor("features"))
            kept += json.loads(facts["names"])
            skipped |= json.loads(facts["skipped"])
    if not kept:
        shown = "; ".join(list(skipped.values())[:3])
        raise UnreadableVideo(f"none of {len(names)} videos is readable{': ' + shown if shown else ''}")
    return VideoFeatures(np.concatenate(values), tuple(kept), skipped)


def _identity(root: Path, name: str) -> list[Any]:
    path = root / name
    facts = path.stat() if path.is_file() else None
    return [name, facts and facts.st_size, facts and facts.st_mtime_ns]
