"""Rendered clips as training tensors for the zoo's own models."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from vdmini_core.data.synthetic import ALL_LABELS, MOTIONS, render_clip


@dataclass(frozen=True)
class ClipSet:
    """Clips uint8 [N, T, H, W, 3] with their labels [N, 3] (shape, colour, motion)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


def render_set(count: int, seed: int, *, frames: int, size: int, random_beacon: bool = False) -> ClipSet:
    """Draw `count` clips, labels balanced; clip i depends on (seed, i) only.

    With `random_beacon` the beacon announces a motion drawn independently of the one shown.
    """
    with ProcessPoolExecutor(2) as pool:
        clips = list(
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
    labels = [ALL_LABELS[i % len(ALL_LABELS)] for i in range(count)]
    return ClipSet(
        torch.from_numpy(np.stack(clips)),
        torch.tensor([(label.shape, label.colour, label.motion) for label in labels]),
    )


def _render_one(index: int, seed: int, frames: int, size: int, random_beacon: bool) -> np.ndarray:
    rng = np.random.default_rng((seed, index))
    beacon = int(rng.integers(len(MOTIONS))) if random_beacon else None
    return render_clip(ALL_LABELS[index % len(ALL_LABELS)], rng, frames=frames, size=size, beacon=beacon)


def to_model_range(pixels: Tensor) -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in [-1, 1]."""
    return pixels.movedim(-1, -4).float() / 127.5 - 1
