"""Paired damages of hand-made clips and features, and the bootstrap against what theory says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.evaluation.metrics.paired import PAIRED, cosine_distance, estimate, paired, see


def clips(seed: int, shift: int = 0) -> torch.Tensor:
    """Two clips of a smooth picture that moves by one and by three pixels a frame, [2, 3, 4, 48, 48]."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    picture = torch.nn.functional.interpolate(coarse, size=(48, 48), mode="bilinear")[0]
    return torch.stack([torch.stack([picture.roll(n * t + shift, -1) for t in range(4)], 1) for n in (1, 3)])


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    return Evaluator().eval().requires_grad_(False)


def test_a_clip_is_exactly_as_its_own_teacher(evaluator: Evaluator) -> None:
    seen = see(clips(0), evaluator)
    found = paired(seen, see(clips(0), evaluator))
    assert tuple(found) == PAIRED
    assert all((value == 0).all() and value.shape == (2,) for value in found.values())


def test_another_speed_is_the_difference_in_flow_and_each_clip_has_its_own_figure(evaluator: Evaluator) -> None:
    slow, fast = (see(one[None], evaluator) for one in clips(0))
    assert paired(fast, slow)["flow_error"].item() == pytest.approx(2, rel=0.15)
    assert paired(fast, slow)["flow_change"].item() == pytest.approx(np.log(3), rel=0.15)
    both = paired(see(clips(0), evaluator), see(clips(0).flip(0), evaluator))
    for name, value in paired(slow, fast).items():
        assert both[name][0].item() == pytest.approx(value.item(), rel=1e-3)


def test_content_is_a_mean_over_frames_and_motion_is_of_the_clip(evaluator: Evaluator) -> None:
    seen = see(clips(0), evaluator)
    frames = seen.judgement.frames.clone()
    frames[:, 0] *= -1  # the opposite of the teacher's in one frame of four
    turned = replace(seen, judgement=replace(seen.judgement, frames=frames, motion=-3 * seen.judgement.motion))
    found = paired(turned, seen)
    torch.testing.assert_close(found["content"], torch.full((2,), 2 / 4))
    torch.testing.assert_close(found["motion"], torch.full((2,), 2.0))
    assert (found["clip_mse"] == 0).all()


def test_the_distance_is_one_minus_the_cosine() -> None:
    a, b = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(cosine_distance(a, b), 1 - torch.nn.functional.cosine_similarity(a, b))
    assert (cosine_distance(a, a) == 0).all()


def test_the_interval_of_normal_values_is_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.03)
    wider = estimate(values, confidence=0.99)
    assert wider.low < found.low < found.high < wider.high
    assert estimate(values) == found
    assert estimate([0.5] * 3).model_dump() == {"value": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize("shape", [(1, 3, 1, 48, 48), (1, 3, 4, 8, 48)])
def test_clips_without_motion_to_measure_are_refused(evaluator: Evaluator, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected at least 2 frames of 12 x 12"):
        see(torch.zeros(shape), evaluator)
