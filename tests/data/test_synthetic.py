"""The drawn clips: deterministic, and what their labels say."""

import numpy as np
import pytest

from vdmini_core.data.synthetic import ALL_LABELS, BEACONS, COLOURS, MOTIONS, SHAPES, Label, render_clip

FRAMES, SIZE = 8, 64


def draw(motion: str, seed: int = 3, *, shape: str = "circle", speed: float = 1.0) -> np.ndarray:
    label = Label(SHAPES.index(shape), list(COLOURS).index("red"), MOTIONS.index(motion))
    return render_clip(label, np.random.default_rng(seed), frames=FRAMES, size=SIZE, speed=speed)


def red(clip: np.ndarray) -> np.ndarray:
    """Where the shape is, bool [T, H, W]: the background is grey, the beacon white."""
    values = clip.astype(int)
    return (values[..., 0] > 150) & (values[..., 1] < 110) & (values[..., 2] < 110)


def centres(clip: np.ndarray) -> np.ndarray:
    """Centre (x, y) of the shape in every frame, [T, 2]."""
    return np.array([[np.nonzero(mask)[1].mean(), np.nonzero(mask)[0].mean()] for mask in red(clip)])


def test_the_same_seed_draws_the_same_clip_and_another_seed_another() -> None:
    assert (draw("left", 3) == draw("left", 3)).all()
    assert (draw("left", 3) != draw("left", 4)).any()


def test_a_clip_is_uint8_frames_of_the_asked_size() -> None:
    label = ALL_LABELS[0]
    clip = render_clip(label, np.random.default_rng(0), frames=5, size=32)
    assert clip.shape == (5, 32, 32, 3)
    assert clip.dtype == np.uint8


def test_every_combination_of_shape_colour_and_motion_has_its_own_class_name() -> None:
    assert len(ALL_LABELS) == len(SHAPES) * len(COLOURS) * len(MOTIONS)
    assert len({label.class_name for label in ALL_LABELS}) == len(ALL_LABELS)
    assert Label(0, 0, 0).class_name == "RedCircleLeft"


@pytest.mark.parametrize(
    ("motion", "direction"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))]
)
def test_the_shape_travels_in_the_direction_of_its_name(motion: str, direction: tuple[int, int]) -> None:
    path = centres(draw(motion))
    moved = path[-1] - path[0]
    along, across = moved @ np.array(direction), abs(moved @ np.array(direction[::-1]))
    assert along > 12
    assert across < 4
    assert (np.diff(path @ np.array(direction)) > 0).all()


def test_growing_enlarges_and_shrinking_reduces_the_area_in_place() -> None:
    for motion, sign in (("grow", 1), ("shrink", -1)):
        clip = draw(motion)
        area = red(clip).sum((1, 2))
        assert (np.diff(area) * sign > 0).all()
        assert np.abs(centres(clip)[-1] - centres(clip)[0]).max() < 3


def test_a_bounce_rises_and_comes_back() -> None:
    height = -centres(draw("bounce"))[:, 1]
    assert height.max() - height[0] > 10
    assert abs(height[-1] - height[0]) < 1


def test_clockwise_and_counterclockwise_turn_the_hand_in_opposite_directions() -> None:
    turns = {}
    for motion in ("clockwise", "counterclockwise"):
        clip = draw(motion)
        dark = clip.max(-1) < 60
        hand = np.array([[np.nonzero(mask)[1].mean(), np.nonzero(mask)[0].mean()] for mask in dark])
        arm = hand - centres(clip)
        # y points down, so growing angles turn clockwise on the screen.
        turns[motion] = np.diff(np.unwrap(np.arctan2(arm[:, 1], arm[:, 0]))).sum()
    assert turns["clockwise"] > 1.5
    assert turns["counterclockwise"] < -1.5


def test_every_motion_but_the_bounce_is_announced_by_its_own_place_on_the_border() -> None:
    places = [place for place in BEACONS.values() if place is not None]
    assert len(set(places)) == len(MOTIONS) - 1
    frame = draw("left")[0].astype(int)
    x = round((BEACONS["left"][0] + 1) * SIZE / 2)
    assert frame[SIZE // 2, x].min() > 240
    assert frame[SIZE // 2, SIZE - 1 - x].min() < 240


def test_the_announced_motion_may_differ_from_the_one_shown() -> None:
    label = Label(0, 0, MOTIONS.index("left"))
    told_right = render_clip(label, np.random.default_rng(3), frames=FRAMES, size=SIZE, beacon=MOTIONS.index("right"))
    path = centres(told_right)
    assert path[-1, 0] < path[0, 0] - 12
    assert told_right[0, SIZE // 2, SIZE - 4].min() > 240


def test_speed_scales_the_travel() -> None:
    whole, half = centres(draw("right")), centres(draw("right", speed=0.5))
    assert half[-1, 0] - half[0, 0] == pytest.approx((whole[-1, 0] - whole[0, 0]) / 2, abs=1)
