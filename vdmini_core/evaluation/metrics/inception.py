"""Inception score of class probabilities (Salimans et al. 2016, arXiv 1606.03498); for videos as in StyleGAN-V."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.special import rel_entr


def inception_scores(probabilities: npt.ArrayLike, splits: int = 10) -> list[float]:
    """exp(mean KL(p(y|x) || p(y))) of `splits` equal parts of probabilities [N, classes], in the order they come in.

    The score is their mean. ValueError where rows are no probabilities, or a part would have fewer than two.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or (p < 0).any() or not np.allclose(p.sum(1), 1, atol=1e-3):
        raise ValueError(
            f"expected probabilities [N, classes] whose rows sum to 1, got {p.shape}; the extractor of an inception "
            "score ends in a softmax, as c3d_ucf101.pt does"
        )
    if len(p) < 2 * splits:
        raise ValueError(f"{splits} parts of at least two clips need {2 * splits} clips, got {len(p)}")
    bounds = [index * len(p) // splits for index in range(splits + 1)]
    parts = (p[a:b] for a, b in pairwise(bounds))
    return [float(np.exp(rel_entr(part, part.mean(0)).sum(1).mean())) for part in parts]
