"""Flow, flicker and contrast of hand-made clips."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vdmini_core.evaluation.metrics.dynamics import DYNAMICS, contrast, dynamics, flicker, flow

FRAMES, SIDE = 6, 48


def texture(seed: int = 0) -> Tensor:
    """A smooth random picture [3, SIDE, SIDE] in [-1, 1]."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0]


def clip_of(frames: list[Tensor]) -> Tensor:
    """[1, 3, T, H, W] of pictures [3, H, W]."""
    return torch.stack(frames, 1)[None]


def moving(pixels: int) -> Tensor:
    return clip_of([texture().roll(pixels * step, -1) for step in range(FRAMES)])


def test_a_picture_that_is_shifted_by_two_pixels_a_frame_flows_by_two() -> None:
    assert flow(moving(2)).item() == pytest.approx(2.0, rel=0.1)
    assert flow(torch.cat([moving(1), moving(2)])).tolist() == [flow(moving(1)).item(), flow(moving(2)).item()]


def test_a_still_clip_neither_flows_nor_flickers() -> None:
    still = clip_of([texture()] * FRAMES)
    assert flow(still).item() == flicker(still).item() == 0
    assert contrast(still) > 0.2


def test_frames_of_independent_noise_flicker_as_their_variance_says() -> None:
    noise = torch.randn(1, 3, 64, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.3
    # a - 2b + c has 6 times the variance of a; the mean of |N(0, s)| is s * sqrt(2 / pi).
    assert flicker(noise).item() == pytest.approx(0.3 * np.sqrt(6) * np.sqrt(2 / np.pi), rel=0.01)


def test_a_clip_that_fades_evenly_does_not_flicker() -> None:
    fading = clip_of([texture() * (1 - step / 10) for step in range(FRAMES)])
    assert flicker(fading).item() == pytest.approx(0, abs=1e-6)


def test_a_solid_colour_has_neither_contrast_nor_flow_even_if_it_blinks() -> None:
    blinking = clip_of([torch.full((3, SIDE, SIDE), 0.5 * (-1) ** step) for step in range(FRAMES)])
    assert contrast(blinking).item() == flow(blinking).item() == 0
    assert flicker(blinking).item() == pytest.approx(2.0)


def test_contrast_is_the_deviation_within_a_frame_not_between_frames() -> None:
    halves = torch.ones(3, SIDE, SIDE)
    halves[..., : SIDE // 2] = -1
    assert contrast(clip_of([halves] * FRAMES)).item() == pytest.approx(1.0)
    assert contrast(clip_of([halves * 0.5 + 0.1 * step for step in range(3)])).item() == pytest.approx(0.5)


def test_all_three_come_in_the_order_of_their_names() -> None:
    clips = torch.cat([moving(1), moving(2)])
    expected = torch.stack([{"flow": flow, "flicker": flicker, "contrast": contrast}[n](clips) for n in DYNAMICS], 1)
    assert torch.equal(dynamics(clips), expected.float())


@pytest.mark.parametrize("shape", [(1, 3, 2, 16, 16), (1, 3, 4, 8, 16)])
def test_clips_too_short_or_too_small_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected at least 3 frames of 12 x 12 .* change data\.frames"):
        dynamics(torch.zeros(shape))
