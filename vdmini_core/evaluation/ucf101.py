"""FVD and inception score of video files, by the protocol of StyleGAN-V (arXiv 2112.14683) on UCF101.

The distance depends on the number of clips: two samples of one distribution are 27 apart at 64 clips and 1 at 2,048
(400 features). So N is part of the protocol, and the distance of real clips to other real ones stands beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from vdmini_core.artifacts import Provenance, Record, json_digest, read_json
from vdmini_core.data.ucf101 import class_words, listed_videos
from vdmini_core.data.video import VIDEO_SUFFIXES, codec_of
from vdmini_core.evaluation.extractor import Extractor
from vdmini_core.evaluation.generation import MANIFEST, GenerationManifest, Order
from vdmini_core.evaluation.metrics.frechet import frechet_distance
from vdmini_core.evaluation.metrics.inception import inception_scores
from vdmini_core.evaluation.protocol import Protocol
from vdmini_core.evaluation.video_features import ClipSpec, VideoFeatures

SUBSETS = 5
LEVEL = 0.95
I3D_WIDTH = 400
Part = Literal["train", "test", "all"]


class Subsets(Record):
    """Values of disjoint subsets of `clips` each, with the 95% t-interval of their mean."""

    clips: int
    values: tuple[float, ...]
    mean: float
    low: float
    high: float


class Floor(Record):
    """The distance of real clips to as many other real ones: of N, or of what there is, and then higher than at N."""

    fvd: float
    clips: int


class FVDResult(Record):
    """FVD at N = `clips` of each side.

    `subsets` shows how much it varies from clips to clips; its values are of fewer clips, and so higher. `floor` is
    None where there are not two real clips for each half. `skipped` are unreadable files by side.
    """

    fvd: float
    clips: int
    floor: Floor | None
    subsets: Subsets | None
    width: int
    skipped: dict[str, dict[str, str]]
    protocol: dict[str, Any]
    protocol_digest: str
    provenance: Provenance


class InceptionResult(Record):
    """Inception score of N = `clips` generated videos: the mean of its splits, and their interval."""

    inception_score: float
    clips: int
    splits: Subsets
    skipped: dict[str, str]
    protocol: dict[str, Any]
    protocol_digest: str
    provenance: Provenance


@dataclass(frozen=True)
class Videos:
    """Files to take clips from, in the order in which they are taken; `made` is how they were generated, if known."""

    root: Path
    names: tuple[str, ...]
    description: str
    made: GenerationManifest | None = None


def real_videos(root: Path, split: int, part: Part, seed: int = 0) -> Videos:
    """UCF101's list `part` of a split, or all videos of any other folder, in a seeded order."""
    layout, listed = listed_videos(root, split)
    if layout == "ucf101":
        names = [path for path, _, name in listed if part in ("all", name)]
        return Videos(root, _shuffled(names, seed), f"UCF101 layout, split {split}, {part}")
    return _found(root, seed, "a folder of videos")


def generated_videos(root: Path, seed: int = 0) -> Videos:
    """All videos of a folder in a seeded order; of one that VDMini made, with the record of how."""
    manifest = root / MANIFEST
    if manifest.is_file():
        return _found(root / "videos", seed, "generated", read_json(manifest, GenerationManifest))
    return _found(root, seed, "generated")


def _found(root: Path, seed: int, description: str, made: GenerationManifest | None = None) -> Videos:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist; expected a folder of videos")
    names = [str(path.relative_to(root)) for path in root.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES]
    if not names:
        raise ValueError(f"{root} has no videos ({', '.join(VIDEO_SUFFIXES)})")
    return Videos(root, _shuffled(names, seed), description, made)


def _shuffled(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """An order that depends on the seed and the names alone, not on that of the listing."""
    return tuple(sorted(names, key=lambda name: json_digest([seed, name])))


def conditioned_orders(root: Path, split: int, part: Part, count: int | None, seed: int) -> list[Order]:
    """Videos to generate, one for each real one: from its first frame, or its class's words, under its name.

    `count` are the first that an evaluation of as many clips takes.
    """
    videos = real_videos(root, split, part)
    return [
        Order(
            name=str(Path(name).with_suffix(".mp4")),
            prompt=class_words(Path(name).parent.name),
            seed=int(json_digest([seed, name])[:8], 16) >> 1,
            source=videos.root / name,
        )
        for name in videos.names[:count]
    ]


def fvd_result(
    real: VideoFeatures,
    generated: VideoFeatures,
    count: int,
    ddof: int,
    protocol: Protocol,
    provenance: Provenance,
) -> FVDResult:
    """FVD of the first N clips of each side, N = `count` or what there is; further real clips make the floor."""
    clips = min(count, len(real.values), len(generated.values))
    a, b = real.values[:clips], generated.values[:clips]
    half = min(clips, len(real.values) // 2)
    floor = None
    if half >= 2:
        distance = frechet_distance(real.values[:half], real.values[half : 2 * half], ddof=ddof)
        floor = Floor(fvd=distance, clips=half)
    protocol = protocol.model_copy(update={"clips": clips})
    return FVDResult(
        fvd=frechet_distance(a, b, ddof=ddof),
        clips=clips,
        floor=floor,
        subsets=subset_distances(a, b, ddof),
        width=a.shape[1],
        skipped={"real": real.skipped, "generated": generated.skipped},
        protocol=protocol.model_dump(mode="json"),
        protocol_digest=protocol.digest(),
        provenance=provenance,
    )


def inception_result(
    features: VideoFeatures, count: int, splits: int, protocol: Protocol, provenance: Provenance
) -> InceptionResult:
    """Inception score of the first `count` clips, or of what there is."""
    values = features.values[:count]
    scores = inception_scores(values, splits)
    protocol = protocol.model_copy(update={"clips": len(values)})
    return InceptionResult(
        inception_score=math.fsum(scores) / len(scores),
        clips=len(values),
        splits=_interval(scores, len(values) // splits),
        skipped=features.skipped,
        protocol=protocol.model_dump(mode="json"),
        protocol_digest=protocol.digest(),
        provenance=provenance,
    )


def subset_distances(a: npt.ArrayLike, b: npt.ArrayLike, ddof: int, subsets: int = SUBSETS) -> Subsets | None:
    """Distances of disjoint subsets of N / `subsets` clips; None where these are fewer than two."""
    a, b = np.asarray(a), np.asarray(b)
    size = len(a) // subsets
    if size < 2:
        return None
    parts = [slice(index * size, (index + 1) * size) for index in range(subsets)]
    return _interval([frechet_distance(a[part], b[part], ddof=ddof) for part in parts], size)


def _interval(values: Sequence[float], clips: int) -> Subsets:
    mean = math.fsum(values) / len(values)
    quantile = float(student_t.ppf((1 + LEVEL) / 2, len(values) - 1)) if len(values) > 1 else math.nan
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Subsets(clips=clips, values=tuple(values), mean=mean, low=mean - half, high=mean + half)


def video_protocol(
    measure: str,
    extractor: Extractor,
    spec: ClipSpec,
    real: Videos | None,
    generated: Videos,
    ddof: int | None,
) -> Protocol:
    """How a number of video files is made; codecs are those of the first file of each side that opens."""
    made = generated.made
    return Protocol(
        measure=measure,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        reference=real and real.description,
        clips=len(generated.names),
        frames=spec.frames,
        fps=spec.fps,
        size=spec.size,
        resize="short side, by area when shrinking, else cubic; then as the extractor does",
        crop="centre",
        ddof=ddof,
        codec=_codec(generated),
        crf=made and made.crf,
        sampling=made and made.sampling,
        details={
            "start": spec.start,
            "start_seed": spec.seed if spec.start == "random" else None,
            "call": extractor.call,
            "reference_codec": real and _codec(real),
            "generated_frames_fps_size": made and [made.frames, made.fps, made.height, made.width],
        },
    )


def _codec(videos: Videos) -> str:
    for name in videos.names[:20]:
        if codec := codec_of(videos.root / name):
            return codec
    return "unknown"


def fvd_text(result: FVDResult) -> str:
    """The distance with what it must never be quoted without."""
    lines = [f"FVD {result.fvd:.4g} at N = {result.clips}, ddof {result.protocol['ddof']}"]
    if result.width != I3D_WIDTH:
        lines.append(f"features of width {result.width}, not I3D's {I3D_WIDTH}: comparable with nothing published")
    if result.floor is None:
        lines.append("no floor: too few real clips")
    else:
        fewer = "" if result.floor.clips == result.clips else "; fewer than N, so higher than at N"
        lines.append(f"real against real {result.floor.fvd:.4g} ({result.floor.clips} clips a side{fewer})")
    if result.subsets is not None:
        s = result.subsets
        lines.append(
            f"{len(s.values)} disjoint subsets of {s.clips}: mean {s.mean:.4g} [{s.low:.4g}, {s.high:.4g}]; fewer "
            "clips are further apart"
        )
    lines += [line for side, skipped in result.skipped.items() for line in skipped_lines(side, skipped)]
    return "\n".join([*lines, f"protocol {result.protocol_digest[:16]}"])


def inception_text(result: InceptionResult) -> str:
    """The score with its N and interval."""
    s = result.splits
    lines = [
        f"inception score {result.inception_score:.4g} at N = {result.clips}",
        f"{len(s.values)} splits of {s.clips}: [{s.low:.4g}, {s.high:.4g}]",
        *skipped_lines("generated", result.skipped),
    ]
    return "\n".join([*lines, f"protocol {result.protocol_digest[:16]}"])


def skipped_lines(side: str, skipped: dict[str, str]) -> list[str]:
    """How many files of a side were unreadable, and which."""
    if not skipped:
        return []
    return [f"{len(skipped)} {side} videos were left out:", *(f"  {reason}" for reason in skipped.values())]
