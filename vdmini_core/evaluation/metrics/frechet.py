"""Frechet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500)."""

import numpy as np
import numpy.typing as npt


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
