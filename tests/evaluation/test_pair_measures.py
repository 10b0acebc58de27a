"""Measures of pairs and of sets against closed forms, brute force and independent code; BCa against scipy's theory."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from tests.evaluation.test_paired import clips
from vdmini_core.evaluation.metrics.manifold import precision_and_recall
from vdmini_core.evaluation.metrics.paired import bca, estimate, ratio_of_means
from vdmini_core.evaluation.metrics.perceptual import PERCEPTUAL, perceptual_distances, perceptual_measures
from vdmini_core.evaluation.metrics.pixels import MOST_PSNR, pixel_measures


def test_psnr_of_a_constant_offset_is_its_closed_form_and_a_mean_over_frames() -> None:
    clip = torch.zeros(2, 3, 2, 16, 16)
    other = clip.clone()
    other[0] += 0.2  # 0.1 of the range
    other[1, :, 0] += 0.02
    other[1, :, 1] += 0.2
    torch.testing.assert_close(pixel_measures(other, clip)["psnr"], torch.tensor([20.0, 30.0]), rtol=1e-4, atol=0)
    assert pixel_measures(clip, clip)["psnr"].tolist() == [MOST_PSNR] * 2


def test_ssim_is_that_of_its_paper_written_out_with_scipy() -> None:
    ours, theirs = clips(0)[:1], clips(1)[:1]

    def blurred(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, truncate=5 / 1.5, axes=(-2, -1), mode="mirror")

    x, y = ((clip.transpose(1, 2)[0].double().numpy() + 1) / 2 for clip in (ours, theirs))
    mx, my = blurred(x), blurred(y)
    vx, vy, vxy = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
    index = (2 * mx * my + 0.01**2) * (2 * vxy + 0.03**2) / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))
    expected = index.mean()
    assert pixel_measures(ours, theirs)["ssim"].item() == pytest.approx(expected, abs=1e-4)
    assert pixel_measures(ours, ours)["ssim"].item() == pytest.approx(1)


def brute_force(centres: np.ndarray, points: np.ndarray, nearest: int) -> list[float]:
    """Whether each point lies in the ball of any centre, in the words of the definition."""
    inside = []
    for point in points:
        hit = False
        for index, centre in enumerate(centres):
            others = sorted(np.linalg.norm(centre - c) for j, c in enumerate(centres) if j != index)
            hit |= bool(np.linalg.norm(point - centre) <= others[nearest - 1])
        inside.append(float(hit))
    return inside


@pytest.mark.parametrize("nearest", [1, 3, 5])
def test_precision_and_recall_are_their_definition(nearest: int) -> None:
    rng = np.random.default_rng(nearest)
    real, generated = rng.normal(0, 1, (23, 4)), rng.normal(0.7, 0.8, (17, 4))
    precision, recall = precision_and_recall(real, generated, nearest)
    assert precision.tolist() == brute_force(real, generated, nearest)
    assert recall.tolist() == brute_force(generated, real, nearest)
    assert 0 < precision.mean() < 1 or nearest > 1


def test_a_collapsed_set_has_precision_without_recall_and_a_wide_one_the_reverse() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(0, 1, (60, 3))
    precision, recall = precision_and_recall(real, rng.normal(0, 0.05, (60, 3)))
    assert precision.mean() == 1
    assert recall.mean() < 0.2
    precision, recall = precision_and_recall(real, rng.normal(0, 10, (60, 3)))
    assert precision.mean() < 0.5 < recall.mean()


def test_too_few_features_for_the_neighbour_are_refused() -> None:
    with pytest.raises(ValueError, match=r"neighbour 5 of 5 features; expected 1 to 4, or more clips"):
        precision_and_recall(np.zeros((9, 2)), np.zeros((5, 2)))


def test_bca_of_a_mean_of_skewed_values_leans_where_the_percentiles_do_not() -> None:
    values = np.random.default_rng(0).exponential(1, 60)
    corrected, plain = bca([values]), estimate(values)
    assert corrected.value == pytest.approx(values.mean())
    assert corrected.low > plain.low
    assert corrected.high > plain.high + 0.01
    assert bca([values]) == corrected
    assert bca([values], seed=1) != corrected


def test_bca_covers_the_truth_as_often_as_it_says() -> None:
    found = [bca([np.random.default_rng(n).exponential(1, 40)], seed=n, confidence=0.9) for n in range(120)]
    assert 0.82 < np.mean([e.low < 1 < e.high for e in found]) < 0.97


def test_where_nothing_varies_the_interval_is_a_point() -> None:
    assert bca([np.ones(7)]).model_dump() == {"value": 1, "low": 1, "high": 1}
    assert bca([np.zeros(7)] * 2, ratio_of_means).model_dump() == {"value": 0, "low": 0, "high": 0}


def test_a_ratio_is_of_means_and_its_pairs_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.uniform(0.1, 10, 50)
    together = bca([teacher / 2, teacher], ratio_of_means)
    assert (together.value, together.low, together.high) == pytest.approx((0.5,) * 3)
    apart = bca([rng.permutation(teacher) / 2, teacher], ratio_of_means)
    assert apart.value == pytest.approx(0.5)
    assert apart.high - apart.low > 0.05


@pytest.mark.parametrize("name", sorted(PERCEPTUAL))
def test_a_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"perceptual names {name}.*pip install 'vdmini\[{name}\]'"):
        perceptual_distances([name], torch.device("cpu"))


def test_perceptual_distances_get_what_their_networks_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' interfaces that answer the mean absolute difference of what they are given."""
    asked: dict[str, Any] = {}

    class Network(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            asked["shape"], asked["low"] = a.shape, float(a.min())
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    lpips, dreamsim = ModuleType("lpips"), ModuleType("dreamsim")
    lpips.LPIPS = lambda **options: asked.update(options) or Network()  # type: ignore[attr-defined]
    dreamsim.dreamsim = lambda **options: (Network(), None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    monkeypatch.setitem(sys.modules, "dreamsim", dreamsim)
    one = torch.full((2, 3, 4, 16, 16), -1.0)
    other = one.clone()
    other[1, :, 0] += 0.4  # one frame of four
    for name, scale, shape, low in [("lpips", 1, (8, 3, 16, 16), -1), ("dreamsim", 0.5, (8, 3, 224, 224), 0)]:
        found = perceptual_measures(perceptual_distances([name], torch.device("cpu")), one, other)
        torch.testing.assert_close(found[name], torch.tensor([0.0, 0.1 * scale]))
        assert (asked["shape"], asked["low"]) == (shape, low)
    assert asked["net"] == "alex"
