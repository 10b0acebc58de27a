"""Rendered clips as training tensors for the zoo's own models."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from vdmini_core.data.synthetic import ALL_LABELS, MOTIONS, render_clip

FRAMES, SIZE = 8, 64
"""Of the built-in clips."""


@dataclass(frozen=True)
class ClipSet:
    """Clips uint8 [N, T, H, W, 3] with their labels [N, 3] (shape, colour, motion).

    `beacons` [N] are the motions that are announced.
    """

    pixels: Tensor
    labels: Tensor
    beacons: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


def render_set(count: int, seed: int, *, frames: int, size: int, random_beacon: bool = False) -> ClipSet:
    """Draw `count` clips, labels balanced; clip i depends on (seed, i) only.

    With `random_beacon` the beacon announces a motion drawn independently of the one shown.
    """
    with ProcessPoolExecutor() as pool:
        drawn = list(
            pool.map(
                _render_one,
                range(count),
                repeat(seed),
                repeat(frames),
                repeat(size),
                repeat(random_beacon),
                chunksize=64,
            )
        )
    clips, beacons = zip(*drawn, strict=True)
    labels = [ALL_LABELS[i % len(ALL_LABELS)] for i in range(count)]
    return ClipSet(
        torch.from_numpy(np.stack(clips)),
        torch.tensor([(label.shape, label.colour, label.motion) for label in labels]),
        torch.tensor(beacons),
    )


def _render_one(index: int, seed: int, frames: int, size: int, random_beacon: bool) -> tuple[np.ndarray, int]:
    """One clip, and the motion that its beacon announces."""
    rng = np.random.default_rng((seed, index))
    label = ALL_LABELS[index % len(ALL_LABELS)]
    beacon = int(rng.integers(len(MOTIONS))) if random_beacon else label.motion
    return render_clip(label, rng, frames=frames, size=size, beacon=beacon), beacon


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in [-1, 1]."""
    return pixels.movedim(-1, -4).float() / 127.5 - 1
