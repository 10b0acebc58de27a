"""Aggregates VBench's dimensions into Quality, Semantic (or I2V) and Total as the leaderboard does.

Every dimension is brought to 0..1 by its range, x' = (x - low) / (high - low); groups are weighted means of these,
and the total a weighted mean of the groups. Constants: scripts/constant.py of the official code at commit 45e79ec.
What is missing is missing here: the official script counts it as 0.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from vdmini_core.artifacts import Record


@dataclass(frozen=True)
class Group:
    """A weighted mean of dimensions, and the weight that it has itself in the total."""

    weights: dict[str, float]
    weight: float


QUALITY = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "dynamic_degree": 0.5,
    "aesthetic_quality": 1.0,
    "imaging_quality": 1.0,
}
SEMANTIC = (
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
I2V_QUALITY = {name: weight for name, weight in QUALITY.items() if name != "temporal_flickering"}
I2V = {"i2v_subject": 1.0, "i2v_background": 1.0, "camera_motion": 0.1}

SUITES: dict[str, dict[str, Group]] = {
    "t2v": {"quality": Group(QUALITY, 4.0), "semantic": Group(dict.fromkeys(SEMANTIC, 1.0), 1.0)},
    "i2v": {"quality": Group(I2V_QUALITY, 1.0), "i2v": Group(I2V, 1.0)},
}
"""Suite -> its groups, text to video and image to video."""
DIMENSIONS: dict[str, tuple[str, ...]] = {
    suite: tuple(name for group in groups.values() for name in group.weights) for suite, groups in SUITES.items()
}
RANGES: dict[str, tuple[float, float]] = {
    "subject_consistency": (0.1462, 1.0),
    "i2v_subject": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "i2v_background": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
"""Empirical low and high of a dimension; 0 and 1 where there is none."""
LEADERBOARD_NAMES = {
    "video_image_subject_consistency": "i2v_subject",
    "video_image_background_consistency": "i2v_background",
    "video_text_camera_motion": "camera_motion",
}
PROMPTS: dict[str, dict[str, int]] = {
    "t2v": {
        "subject_consistency": 72,
        "background_consistency": 86,
        "motion_smoothness": 72,
        "dynamic_degree": 72,
        "aesthetic_quality": 93,
        "imaging_quality": 93,
        "object_class": 79,
        "multiple_objects": 82,
        "human_action": 100,
        "spatial_relationship": 84,
        "scene": 86,
        "appearance_style": 90,
        "temporal_style": 100,
        "overall_consistency": 93,
    },
    "i2v": {
        "i2v_subject": 246,
        "i2v_background": 109,
        "camera_motion": 763,
        "subject_consistency": 246,
        "background_consistency": 109,
        "motion_smoothness": 246,
        "dynamic_degree": 246,
        "aesthetic_quality": 355,
        "imaging_quality": 355,
    },
}
"""Prompts of a dimension whose official result lists every video: not `color` (only where the object was found) and
`temporal_flickering` (only static ones, after the filter).
"""
VIDEOS_PER_PROMPT = 5
KNOWN = {*DIMENSIONS["t2v"], *DIMENSIONS["i2v"]}


class Scores(Record):
    """What was found of a suite. Groups and total are in percent, None where a dimension of theirs is missing.

    `dimensions` are the scores as measured, 0 to 1; `others` are keys of the file that are no dimension of the suite.
    `short` are dimensions of an official result with fewer videos than the suite asks for: how many, and of how many.
    They do count; who made the result knows whether that was meant.
    """

    suite: str
    quality: float | None
    semantic: float | None = None
    i2v: float | None = None
    total: float | None
    complete: bool
    missing: tuple[str, ...]
    dimensions: dict[str, float]
    others: tuple[str, ...] = ()
    short: dict[str, tuple[int, int]] = Field(default_factory=dict)
    unit: str = Field("fraction", description="how the file gave its scores: fraction or percent")


def normalised(name: str, score: float) -> float:
    """A dimension's score within its range, 0..1; outside of it where the score is, as in the official script."""
    low, high = RANGES.get(name, (0.0, 1.0))
    return (score - low) / (high - low)


def aggregate(scores: Mapping[str, float], suite: str, **facts: Any) -> Scores:
    """The groups and the total of a suite from scores in 0..1; `facts` are further fields of the result."""
    if suite not in SUITES:
        raise ValueError(f"there is no VBench suite {suite!r}; there are {', '.join(SUITES)}")
    names = DIMENSIONS[suite]
    groups = {name: _group_score(group, scores) for name, group in SUITES[suite].items()}
    weighted = [(group.weight, groups[name]) for name, group in SUITES[suite].items()]
    known = [(weight, value) for weight, value in weighted if value is not None]
    total = sum(w * value for w, value in known) / sum(w for w, _ in known) if len(known) == len(weighted) else None
    missing = tuple(name for name in names if name not in scores)
    return Scores(
        suite=suite,
        **groups,
        total=total,
        complete=not missing,
        missing=missing,
        dimensions={name: scores[name] for name in names if name in scores},
        **facts,
    )


def _group_score(group: Group, scores: Mapping[str, float]) -> float | None:
    if any(name not in scores for name in group.weights):
        return None
    weighted = sum(weight * normalised(name, scores[name]) for name, weight in group.weights.items())
    return 100 * weighted / sum(group.weights.values())


def read_scores(path: Path, suite: str | None = None) -> Scores:
    """Aggregate an official result file, {dimension: [score, ...]}, or a flat {dimension: score}.

    Scores are fractions; a file in percent is recognised by values above 1, and "96.85%" is read as written. The
    suite is the one whose own dimensions the file has, unless it is given. ValueError says what is no score.
    """
    content = whole_json(path)
    scores, others, unit = parse_scores(content, str(path))
    if suite is None:
        i2v, t2v = (any(name in scores for name in own) for own in (I2V, SEMANTIC))
        if i2v and t2v:
            raise ValueError(f"{path} has dimensions of both suites; say which one is meant: t2v or i2v")
        suite = "i2v" if i2v else "t2v"
    elif suite not in SUITES:
        raise ValueError(f"there is no VBench suite {suite!r}; there are {', '.join(SUITES)}")
    unused = (name for name in scores if name not in DIMENSIONS[suite])
    return aggregate(scores, suite, others=tuple(sorted({*others, *unused})), short=_short(content, suite), unit=unit)


def _short(content: dict[str, Any], suite: str) -> dict[str, tuple[int, int]]:
    found = {}
    for key, value in content.items():
        expected = VIDEOS_PER_PROMPT * PROMPTS[suite].get(canonical(key), 0)
        if isinstance(value, list) and len(value) > 1 and isinstance(value[-1], list) and len(value[-1]) < expected:
            found[canonical(key)] = (len(value[-1]), expected)
    return found


def whole_json(path: Path) -> Any:
    """The content of a JSON file, or ValueError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from None


def parse_scores(content: Any, source: str) -> tuple[dict[str, float], list[str], str]:
    """Scores in 0..1 by dimension, the keys that are none, and the unit the values were in."""
    if not isinstance(content, dict):
        raise ValueError(f"{source}: expected {{dimension: score}} or VBench's own result, got a {_kind(content)}")
    found: dict[str, float] = {}
    exact: set[str] = set()
    others: list[str] = []
    for key, value in content.items():
        name = canonical(key)
        if name not in KNOWN:
            others.append(key)
            continue
        if name in found:
            raise ValueError(f"{source} has {name} more than once (as {key!r}, too)")
        score = _score(value, f"{source}: {key}")
        if score is None:
            continue
        found[name], is_percent = score
        if is_percent:
            exact.add(name)
    if not found:
        known = ", ".join(sorted(KNOWN))
        raise ValueError(f"{source} has no score of a VBench dimension; they are called {known}")
    plain = {name: value for name, value in found.items() if name not in exact}
    unit = "percent" if exact and not plain else _unit(plain, source)
    divisor = 100.0 if unit == "percent" else 1.0
    scores = {name: value / (100.0 if name in exact else divisor) for name, value in found.items()}
    for name, value in scores.items():
        if not -1 <= value <= 1:
            raise ValueError(f"{source}: {name} is {found[name]:g}; expected 0 to 1, or 0 to 100 in percent")
    return scores, others, unit


def canonical(key: str) -> str:
    """`Subject Consistency`, `subject-consistency`, `SubjectConsistency`, `subject_consistency`: one name."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key.strip())
    name = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
    name = re.sub(r"^i_?2_?v_?", "i2v_", name)
    return LEADERBOARD_NAMES.get(name, name)


def _score(value: Any, place: str) -> tuple[float, bool] | None:
    """A number and whether it carries a percent sign; None for a score that is not there."""
    if isinstance(value, list):  # the official result: the score, then what it is made of
        if not value:
            return None
        value = value[0]
    if value is None:
        return None
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*%\s*", value)):
        return float(match[1]), True
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place} is {value!r}; expected a score")
    if not math.isfinite(value):
        raise ValueError(f"{place} is {value}; expected a finite score (no video was scored)")
    return float(value), False


def _unit(scores: Mapping[str, float], source: str) -> str:
    """Percent where a value is above 1; then values of 0 to 1 would be hundredths, and are more likely a mixture."""
    above = [name for name, value in scores.items() if value > 1]
    if not above:
        return "fraction"
    below = [name for name, value in scores.items() if 0 < value <= 1]
    if below:
        raise ValueError(
            f"{source} mixes percent ({above[0]} is {scores[above[0]]:g}) and fractions ({below[0]} is "
            f"{scores[below[0]]:g}); write every score as a fraction, 0 to 1"
        )
    return "percent"


def _kind(value: Any) -> str:
    return {list: "list", str: "text", type(None): "null"}.get(type(value), type(value).__name__)
