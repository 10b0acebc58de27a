"""Draws the labelled clips of the built-in data set: one shape, one colour, one motion.

Convention: pixel coordinates with the origin at the image centre, x to the right, y down, in
pixels of a 64-pixel frame (other sizes scale). Every clip has a textured background and a beacon,
a small white square whose place on the border announces the motion. Only the first frame is given
to an image-to-video model, so the beacon is how it can know which motion to make: it has to read
one place of the scene and move another.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.14, 0.14),
    "green": (0.12, 0.72, 0.18),
    "blue": (0.16, 0.28, 0.95),
    "yellow": (0.96, 0.88, 0.12),
    "magenta": (0.90, 0.18, 0.88),
    "cyan": (0.12, 0.86, 0.92),
}
MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise", "grow", "shrink", "bounce")
# Beacon place in units of the half frame; a bouncing shape has no beacon.
BEACONS: dict[str, tuple[float, float] | None] = {
    "left": (-0.86, 0.0),
    "right": (0.86, 0.0),
    "up": (0.0, -0.86),
    "down": (0.0, 0.86),
    "clockwise": (0.86, -0.86),
    "counterclockwise": (-0.86, -0.86),
    "grow": (0.86, 0.86),
    "shrink": (-0.86, 0.86),
    "bounce": None,
}
REFERENCE_SIZE = 64


@dataclass(frozen=True)
class Label:
    """What a clip shows: indices into SHAPES, COLOURS and MOTIONS."""

    shape: int
    colour: int
    motion: int

    @property
    def class_name(self) -> str:
        """The folder name in the UCF101 layout, for example `RedCircleLeft`."""
        words = (list(COLOURS)[self.colour], SHAPES[self.shape], MOTIONS[self.motion])
        return "".join(word.capitalize() for word in words)


ALL_LABELS = tuple(
    Label(shape, colour, motion)
    for shape in range(len(SHAPES))
    for colour in range(len(COLOURS))
    for motion in range(len(MOTIONS))
)
PHRASES = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "clockwise": "turning clockwise",
    "counterclockwise": "turning counterclockwise",
    "grow": "growing",
    "shrink": "shrinking",
    "bounce": "bouncing",
}
LABEL_BY_CLASS = {label.class_name: label for label in ALL_LABELS}


def describe_label(label: Label) -> str:
    """The label as a caption: `a red circle moving left`."""
    return f"a {list(COLOURS)[label.colour]} {SHAPES[label.shape]} {PHRASES[MOTIONS[label.motion]]}"


def render_clip(
    label: Label,
    rng: np.random.Generator,
    *,
    frames: int,
    size: int,
    beacon: int | None = None,
    speed: float = 1.0,
) -> npt.NDArray[np.uint8]:
    """Draw one clip, uint8 [T, H, W, 3].

    `beacon` is the motion that the beacon announces, by default the label's own; the evaluator is
    trained with one drawn at random, so that it has to judge motion by movement. `speed` scales
    the motion (1.0: the whole travel within the clip).
    """
    announced = label.motion if beacon is None else beacon
    scale = size / REFERENCE_SIZE
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / scale) - REFERENCE_SIZE / 2
    xx, yy = np.meshgrid(axis, axis)
    scene = _background(rng, xx, yy)
    _draw_beacon(scene, MOTIONS[announced], xx, yy)

    centre = rng.uniform(-7, 7, 2)
    radius = rng.uniform(10.0, 13.0)
    angle = rng.uniform(-0.35, 0.35)
    clip = np.empty((frames, size, size, 3), np.float32)
    colour = np.asarray(list(COLOURS.values())[label.colour], np.float32)
    for index in range(frames):
        progress = speed * index / max(frames - 1, 1)
        dx, dy, turn, zoom = _pose(MOTIONS[label.motion], progress)
        clip[index] = scene
        _draw_shape(
            clip[index],
            SHAPES[label.shape],
            colour,
            xx - np.float32(centre[0] + dx),
            yy - np.float32(centre[1] + dy),
            angle + turn,
            radius * zoom,
        )
    return np.asarray(np.round(clip * 255), np.uint8)


def _pose(motion: str, progress: float) -> tuple[float, float, float, float]:
    """Offset in pixels, turn in radians and zoom after `progress` in [0, 1] of the motion."""
    travel = 20.0 * progress
    match motion:
        case "left":
            return -travel, 0.0, 0.0, 1.0
        case "right":
            return travel, 0.0, 0.0, 1.0
        case "up":
            return 0.0, -travel, 0.0, 1.0
        case "down":
            return 0.0, travel, 0.0, 1.0
        case "clockwise":
            return 0.0, 0.0, 2.2 * progress, 1.0
        case "counterclockwise":
            return 0.0, 0.0, -2.2 * progress, 1.0
        case "grow":
            return 0.0, 0.0, 0.0, 1.0 + 0.7 * progress
        case "shrink":
            return 0.0, 0.0, 0.0, 1.0 - 0.5 * progress
        case "bounce":
            return 0.0, -16.0 * float(np.sin(np.pi * progress)), 0.0, 1.0
        case _:
            raise ValueError(f"unknown motion {motion!r}; expected one of {', '.join(MOTIONS)}")


def _background(rng: np.random.Generator, xx: Array, yy: Array) -> Array:
    """Four random plane waves per scene around mid grey, slightly tinted: [H, W, 3] in [0, 1]."""
    scene = np.full((*xx.shape, 3), 0.45, np.float32)
    for _ in range(4):
        wavelength, direction, phase = rng.uniform(12, 40), rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * (np.cos(direction) * xx + np.sin(direction) * yy) / wavelength + phase)
        tint = 0.055 * (0.7 + 0.6 * rng.uniform(size=3))
        scene += wave.astype(np.float32)[..., None] * tint.astype(np.float32)
    return scene


def _draw_beacon(scene: Array, motion: str, xx: Array, yy: Array) -> None:
    place = BEACONS[motion]
    if place is None:
        return
    half = REFERENCE_SIZE / 2
    distance = np.maximum(np.abs(xx - place[0] * half), np.abs(yy - place[1] * half))
    _blend(scene, distance - 4.0, np.asarray((1.0, 1.0, 1.0), np.float32))


def _draw_shape(frame: Array, shape: str, colour: Array, x: Array, y: Array, angle: float, radius: float) -> None:
    """Draw the shape with a dark hand from its centre to its edge, which makes rotation visible."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = cos * x + sin * y, -sin * x + cos * y
    _blend(frame, _signed_distance(shape, u, v, radius), colour)
    hand = np.maximum(np.abs(u) - 0.17 * radius, np.abs(v + 0.42 * radius) - 0.42 * radius)
    _blend(frame, hand, np.asarray((0.06, 0.06, 0.06), np.float32))


def _signed_distance(shape: str, u: Array, v: Array, radius: float) -> Array:
    """Distance in pixels to the outline, negative inside; areas are about equal between shapes."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.9 * radius
    if shape == "triangle":
        side = np.float32(np.sqrt(3) / 2) * np.abs(u) - 0.5 * v
        return np.maximum(side, v) - 0.62 * radius
    if shape == "cross":
        arm_u = np.maximum(np.abs(u) - 1.15 * radius, np.abs(v) - 0.38 * radius)
        arm_v = np.maximum(np.abs(u) - 0.38 * radius, np.abs(v) - 1.15 * radius)
        return np.minimum(arm_u, arm_v)
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def _blend(frame: Array, distance: Array, colour: Array) -> None:
    alpha = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    frame += alpha * (colour - frame)
