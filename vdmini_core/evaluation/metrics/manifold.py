"""Improved precision and recall of generated features (Kynkaanniemi et al. 2019, arXiv 1904.06991).

The authors of the package `prdc` define them alike (Naeem et al. 2020). It has seen no release since 2020, prints,
and asks for eight processes, so that the definition stands here instead.
"""

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

NEAREST = 5

Features = npt.NDArray[np.float64]


def precision_and_recall(real: Features, generated: Features, nearest: int = NEAREST) -> tuple[Features, Features]:
    """1 or 0 a generated feature, and one a real feature: whether it lies in the other set's manifold.

    A set's manifold is the union of balls around its features [N, D] that reach to their `nearest`-th neighbour.
    Precision and recall are the means: what generated clips look real, and what real clips could be generated.
    """
    fewest = min(len(real), len(generated))
    if not 0 < nearest < fewest:
        raise ValueError(f"neighbour {nearest} of {fewest} features; expected 1 to {fewest - 1}, or more clips")
    between = cdist(generated, real)  # [generated, real]
    precision = (between <= _radii(real, nearest)).any(1)
    recall = (between <= _radii(generated, nearest)[:, None]).any(0)
    return precision.astype(np.float64), recall.astype(np.float64)


def _radii(features: Features, nearest: int) -> Features:
    """Distance of each feature to its k-th neighbour, itself not counted."""
    return np.asarray(np.sort(cdist(features, features), 1)[:, nearest])
