"""Alarms: each hand-made failure raises its own, at the threshold that the settings state."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.evaluation.test_dynamics import FRAMES, SIDE, clip_of, moving, texture
from vdmini_core.artifacts import ValidationRow
from vdmini_core.distillation.alarms import alarms, all_raised, raised
from vdmini_core.evaluation.metrics.dynamics import DYNAMICS, dynamics
from vdmini_core.settings import AlarmSettings

LIMITS = AlarmSettings()


def row(step: int = 10, hinge: float | None = 1.9, **changes: Any) -> ValidationRow:
    healthy = {"content_distance": 1.0, "motion_distance": 1.0, "score": 0.5}
    healthy |= {"flow_ratio": 1.0, "flicker_ratio": 1.0, "contrast_ratio": 1.0}
    return ValidationRow(step=step, discriminator_hinge=hinge, **healthy | changes)


def names(*rows: ValidationRow) -> set[str]:
    return {alarm.name for alarm in alarms(rows, LIMITS)}


def row_of(student: Tensor, teacher: Tensor) -> ValidationRow:
    ratios = dynamics(student)[0] / dynamics(teacher)[0]
    return row(**{f"{name}_ratio": float(ratio) for name, ratio in zip(DYNAMICS, ratios, strict=True)})


NOISE = torch.randn(1, 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (moving(2), set()),
        (clip_of([texture()] * FRAMES), {"motion_collapse"}),
        (moving(2) + 0.3 * NOISE, {"flicker"}),
        (clip_of([torch.zeros(3, SIDE, SIDE)] * FRAMES), {"solid_colour", "motion_collapse"}),
    ],
    ids=["the teacher's own", "still", "noisy", "solid"],
)
def test_a_clip_raises_the_alarms_of_what_is_wrong_with_it(clip: Tensor, expected: set[str]) -> None:
    assert names(row_of(clip, moving(2))) == expected


@pytest.mark.parametrize(
    ("name", "value", "changes"),
    [
        ("motion_collapse", 0.5, {"flow_ratio": 0.49}),
        ("slow_motion", 0.75, {"flow_ratio": 0.74}),
        ("flicker", 2.0, {"flicker_ratio": 2.01}),
        ("solid_colour", 0.5, {"contrast_ratio": 0.49}),
    ],
)
def test_an_alarm_states_its_setting_and_what_to_try(name: str, value: float, changes: dict[str, float]) -> None:
    key, figure = next(iter(changes.items()))
    assert name not in names(row(**{key: value}))
    (alarm,) = alarms([row(**changes)], LIMITS)
    assert (alarm.name, alarm.step) == (name, 10)
    assert f"{figure:.2f} times" in alarm.text
    assert f"distill.validation.alarms.{name} is {value}; " in alarm.text


def test_the_discriminator_has_won_when_its_loss_stays_low_for_long() -> None:
    assert names(*[row(hinge=0.05)] * 2) == set()
    assert names(row(hinge=0.5), *[row(hinge=0.05)] * 3) == {"discriminator_won"}
    assert names(*[row(hinge=0.05)] * 3, row(hinge=0.5)) == set()
    assert names(*[row(hinge=0.05)] * 2, row(hinge=None)) == set()


def test_an_alarm_is_raised_once_and_again_when_it_was_gone() -> None:
    still, well = {"flow_ratio": 0.1}, {"flow_ratio": 1.0}
    rows = [row(step, **change) for step, change in enumerate([well, still, still, well, still], 1)]
    assert [len(raised(rows[:count], LIMITS)) for count in range(6)] == [0, 0, 1, 0, 0, 1]
    assert [alarm.step for alarm in all_raised(rows, LIMITS)] == [2, 5]
