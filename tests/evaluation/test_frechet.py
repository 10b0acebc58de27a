"""The Frechet distance against values that independent implementations agree on."""

import json
from pathlib import Path

import numpy as np
import pytest

from vdmini_core.evaluation.metrics.frechet import frechet_distance

CASES = json.loads((Path(__file__).parent.parent / "data" / "frechet.json").read_text())["cases"]


def features(case: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The recipe of the file."""
    n, d = case["n"], case["d"]
    g = np.random.default_rng(case["seed"])
    a = g.standard_normal((n, d))
    w = g.standard_normal((d, d)) / np.sqrt(d)
    return a, g.standard_normal((n, d)) @ w + 0.1


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_distance_is_the_reference_implementations(case: dict[str, int]) -> None:
    a, b = features(case)
    assert frechet_distance(a, b, ddof=0) == pytest.approx(case["ddof0"], rel=1e-6)
    assert frechet_distance(a, b, ddof=1) == pytest.approx(case["ddof1"], rel=1e-6)


def test_identical_sets_are_at_distance_zero() -> None:
    a = np.random.default_rng(0).standard_normal((200, 32))
    assert 0 <= frechet_distance(a, a) < 1e-6
    assert 0 <= frechet_distance(a, a[::-1]) < 1e-6


def test_the_distance_is_symmetric() -> None:
    a, b = features(CASES[-1])
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_a_shift_costs_its_square() -> None:
    a = np.random.default_rng(0).standard_normal((100, 5))
    assert frechet_distance(a, a + 2.0) == pytest.approx(5 * 4.0, rel=1e-6)


def test_two_constant_sets_are_their_gap_apart() -> None:
    assert frechet_distance(np.zeros((4, 3)), np.full((6, 3), 2.0)) == pytest.approx(12.0)


def test_fewer_features_than_dimensions_give_a_finite_distance() -> None:
    g = np.random.default_rng(0)
    distance = frechet_distance(g.standard_normal((3, 64)), g.standard_normal((2, 64)) + 1)
    assert np.isfinite(distance)
    assert distance > 10


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((4, 3)), np.zeros((4, 2)), r"of one width, got \(4, 3\) and \(4, 2\)"),
        (np.zeros(4), np.zeros((4, 1)), r"two feature sets \[N, D\] of one width, got \(4,\)"),
        (np.zeros((4, 3)), np.zeros((1, 3)), "at least two features a set are needed, got 4 and 1"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "NaN or infinity"),
        (np.zeros((4, 3)), np.full((4, 3), np.inf), "NaN or infinity"),
    ],
)
def test_sets_that_have_no_distance_are_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)
