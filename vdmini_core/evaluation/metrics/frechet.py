"""Frechet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500)."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from vdmini_core.artifacts import Record, file_digest


class FeatureDistance(Record):
    """A Frechet distance between the features of two files, with the counts and digests that belong to it."""

    distance: float
    ddof: int
    first: int
    second: int
    width: int
    digests: tuple[str, str]


def distance_of_files(first: Path, second: Path, *, ddof: int = 0) -> FeatureDistance:
    """Frechet distance between features [N, D] in two .npy files; pickled arrays are refused."""
    a, b = read_features(first), read_features(second)
    return FeatureDistance(
        distance=frechet_distance(a, b, ddof=ddof),
        ddof=ddof,
        first=len(a),
        second=len(b),
        width=a.shape[1],
        digests=(file_digest(first), file_digest(second)),
    )


def read_features(path: Path) -> npt.NDArray[np.float64]:
    """Features [N, D] of a .npy file in float64."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected features [N, D] as numpy.save writes them")
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of numbers: {error}") from None
    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.number) or found.ndim != 2:
        raise ValueError(f"{path}: expected numbers [N, D] in a .npy file, got {_described(found)}")
    return found.astype(np.float64)


def _described(found: object) -> str:
    return f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__


def frechet_distance(a: npt.ArrayLike, b: npt.ArrayLike, *, ddof: int = 0) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) for features [N, D], in float64, at least 0.

    `ddof` is the covariance's: 0 as in StyleGAN-V's FVD, 1 in other implementations. No matrix
    square root is taken, so rank-deficient covariances are no special case.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected two feature sets [N, D] of one width, got {x.shape} and {y.shape}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"at least two features a set are needed, got {len(x)} and {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the features contain NaN or infinity")
    gap = x.mean(0) - y.mean(0)
    factor_x = (x - x.mean(0)) / np.sqrt(len(x) - ddof)
    factor_y = (y - y.mean(0)) / np.sqrt(len(y) - ddof)
    # With S = F^T F, tr((S_x S_y)^(1/2)) is the sum of the singular values of F_x F_y^T, or of R_x R_y^T
    # where F = Q R: at most D x D, whatever N is.
    reduced_x, reduced_y = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (factor_x, factor_y))
    cross = np.linalg.svd(reduced_x @ reduced_y.T, compute_uv=False).sum()
    total = gap @ gap + (factor_x**2).sum() + (factor_y**2).sum() - 2 * cross
    return float(max(total, 0.0))
