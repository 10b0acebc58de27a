"""Motion collapse: spoilt copies of synthetic clips each raise their alarm, real ones of another draw none."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from vdmini_core.data.synthetic import COLOURS, MOTIONS, SHAPES, Label, render_clip
from vdmini_core.evaluation.collapse import ADVICE, collapses
from vdmini_core.evaluation.compare import row_alarms
from vdmini_core.evaluation.metrics.dynamics import dynamics
from vdmini_core.evaluation.quality import Judged
from vdmini_core.evaluation.side_by_side import RowClips, ratios
from vdmini_core.settings import ClipAlarmSettings

CLIPS, FRAMES, SIDE = 18, 8, 64
LIMITS = ClipAlarmSettings()


@cache
def real(draw: int, speed: float = 1.0) -> Tensor:
    """Synthetic clips of every motion, [CLIPS, 3, FRAMES, SIDE, SIDE] in [-1, 1]; `draw` places and times them."""
    labels = [Label(n % len(SHAPES), n % len(COLOURS), n % len(MOTIONS)) for n in range(CLIPS)]
    rngs = [np.random.default_rng([draw, n]) for n in range(CLIPS)]
    clips = [render_clip(*of, frames=FRAMES, size=SIDE, speed=speed) for of in zip(labels, rngs, strict=True)]
    return torch.from_numpy(np.stack(clips)).movedim(-1, 1).float() / 127.5 - 1


def frozen(clips: Tensor) -> Tensor:
    return clips[:, :, :1].expand_as(clips)


def flickering(clips: Tensor) -> Tensor:
    """Brighter and darker in turn by 5% of the range."""
    return (clips + 0.1 * (-1) ** torch.arange(FRAMES).view(1, 1, -1, 1, 1)).clamp(-1, 1)


def noisy(clips: Tensor) -> Tensor:
    return (clips + 0.2 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def solid(clips: Tensor) -> Tensor:
    return clips.mean((2, 3, 4), keepdim=True).expand_as(clips)


def slowed(factor: int) -> Callable[[Tensor], Tensor]:
    """The first frames, each change spread over `factor` steps by blending neighbours."""

    def slow(clips: Tensor) -> Tensor:
        times = torch.arange(FRAMES) / factor
        before = times.long()
        share = (times - before).view(1, 1, -1, 1, 1)
        return clips[:, :, before] * (1 - share) + clips[:, :, before + 1] * share

    return slow


def repeated(clips: Tensor) -> Tensor:
    """Every frame shown twice."""
    return clips[:, :, torch.arange(FRAMES) // 2]


def rows_of(student: Tensor, teacher: Tensor) -> dict[str, RowClips]:
    nothing = Judged(torch.zeros(CLIPS, 1), torch.zeros(CLIPS, 1), None)
    return {"teacher": RowClips(nothing, dynamics(teacher)), "recovered": RowClips(nothing, dynamics(student))}


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (frozen, {"motion_collapse"}),
        (flickering, {"flicker"}),
        (noisy, {"flicker"}),
        (solid, {"solid_colour", "motion_collapse"}),
        (slowed(2), {"motion_collapse"}),
        (slowed(4), {"motion_collapse"}),
        (repeated, {"motion_collapse"}),
    ],
    ids=["frozen", "flickering", "noisy", "solid colour", "slowed by 2", "slowed by 4", "every frame twice"],
)
def test_spoilt_clips_raise_their_alarm(spoil: Callable[[Tensor], Tensor], expected: set[str]) -> None:
    found = row_alarms("recovered", rows_of(spoil(real(0)), real(0)), dynamics(real(1)), LIMITS)
    assert set(found) == expected
    for name, text in found.items():
        assert text.startswith("the recovered student's clips ")
        assert f"evaluate.alarms.{name} is {getattr(LIMITS, name)}; {ADVICE[name]}" in text


@pytest.mark.parametrize(("speed", "expected"), [(0.25, {"motion_collapse"}), (0.6, {"slow_motion"}), (1.0, set())])
def test_the_same_clips_rendered_slower_raise_an_alarm_by_how_slow_they_are(speed: float, expected: set[str]) -> None:
    assert set(row_alarms("recovered", rows_of(real(0, speed), real(0)), dynamics(real(1)), LIMITS)) == expected


@pytest.mark.parametrize("draw", [1, 2, 3])
def test_the_teacher_raises_none_beside_real_clips_that_it_never_saw(draw: int) -> None:
    assert row_alarms("teacher", rows_of(real(0), real(draw)), dynamics(real(0)), LIMITS) == {}


def test_a_teacher_that_stands_still_is_told_of_as_such() -> None:
    (text,) = row_alarms("teacher", rows_of(real(0), frozen(real(0))), dynamics(real(1)), LIMITS).values()
    assert text.startswith("the teacher's clips move 0.00 times as much as real ones, evaluate.alarms.motion_collapse")
    assert text.endswith("take another teacher")


def test_ratios_are_of_means_over_clips() -> None:
    found = ratios(torch.tensor([[1.0, 2, 3], [3, 2, 1]]), torch.tensor([[4.0, 1, 2]]))
    assert found == {"flow": 0.5, "flicker": 2.0, "contrast": 1.0}


def test_limits_are_exact() -> None:
    def names(**changes: float) -> set[str]:
        return set(collapses({"flow": 1.0, "flicker": 1.0, "contrast": 1.0} | changes, LIMITS, "key"))

    assert names(flow=0.75, flicker=2.0, contrast=0.5) == set()
    assert names(flow=0.74) == names(flow=0.5) == {"slow_motion"}
    assert names(flow=0.49, flicker=2.01, contrast=0.49) == {"motion_collapse", "flicker", "solid_colour"}
