"""VBench's temporal_flickering, which needs no weights: how little a frame differs from the one before."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from vdmini_core.artifacts import Record
from vdmini_core.data.video import Frames, UnreadableVideo


class Flickering(Record):
    """The mean over videos, as the official code takes it, each video's own, and those that could not be judged."""

    score: float | None
    videos: dict[str, float]
    skipped: dict[str, str]


def temporal_flickering(videos: Iterable[Path]) -> Flickering:
    """Judge encoded videos one after the other; unreadable ones, and those of one frame, are left out and named."""
    scores: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for path in videos:
        try:
            scores[str(path)] = flickering_score(path)
        except UnreadableVideo as error:
            skipped[str(path)] = str(error)
    mean = float(np.mean(list(scores.values()))) if scores else None
    return Flickering(score=mean, videos=scores, skipped=skipped)


def flickering_score(path: Path) -> float:
    """(255 - mean absolute difference of consecutive frames) / 255, of every frame as OpenCV decodes it.

    1 is a frozen video. Official: vbench/temporal_flickering.py at 45e79ec, which takes each pair's mean in float32.
    """
    previous: Frames | None = None
    total, pairs = 0.0, 0
    for frame in _frames(path):
        if previous is not None:
            total += float(cv2.absdiff(frame, previous).mean(dtype=np.float64))
            pairs += 1
        previous = frame
    if pairs == 0:
        found = "no frame" if previous is None else "one frame"
        raise UnreadableVideo(f"{path} has {found}; flickering is measured between two")
    return (255.0 - total / pairs) / 255.0


def _frames(path: Path) -> Iterator[Frames]:
    """uint8 [H, W, 3], BGR, as long as they decode."""
    video = cv2.VideoCapture(str(path))
    try:
        while True:
            read, frame = video.read()
            if not read:
                return
            yield frame
    finally:
        video.release()
