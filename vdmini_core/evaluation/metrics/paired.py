"""Clips beside the intact teacher's from the same noise and condition: how far they moved, in content and in motion."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdmini_core.artifacts import Estimate, UnitScore
from vdmini_core.evaluation.evaluator import Evaluator, Judgement
from vdmini_core.evaluation.metrics.dynamics import flow_fields, flow_lengths

PAIRED = ("content", "motion", "flow_error", "flow_change", "clip_mse")
RESAMPLES = 2000
HARMLESS = 1e-3  # content or motion damage below which nothing is seen, and the exact rank does not matter
STILL = 0.05  # pixels a frame: below this a flow's length is mostly estimation error


@dataclass(frozen=True)
class Seen:
    """What is compared of B clips."""

    clips: Tensor
    judgement: Judgement
    flows: Tensor


@torch.no_grad()
def see(clips: Tensor, evaluator: Evaluator) -> Seen:
    """Judge clips [B, 3, T, H, W] in [-1, 1] and estimate their optical flow; ValueError where they are too small."""
    if clips.shape[2] < 2 or min(clips.shape[-2:]) < 12:
        raise ValueError(
            f"clips of {clips.shape[2]} frames of {clips.shape[3]} x {clips.shape[4]} pixels; expected at least 2 "
            "frames of 12 x 12 to measure motion: change data.frames or data.size"
        )
    return Seen(clips.float(), evaluator(clips), flow_fields(clips))


def paired(clips: Seen, teacher: Seen) -> dict[str, Tensor]:
    """The measures named in PAIRED of each clip, [B] in float32 on the CPU; all are 0 for the teacher's own clips.

    - content: 1 - cosine of the evaluator's features of a single frame, a mean over frames.
    - motion: 1 - cosine of its features of the motion in the clip.
    - flow_error: mean end-point error of the optical flow, pixels a frame.
    - flow_change: |ln| of the ratio of the flows' mean lengths, which are taken to be at least STILL.
    - clip_mse: mean squared difference of pixels, whose range is [-1, 1].
    """
    ours, theirs = clips.judgement, teacher.judgement
    length, of_teacher = (flow_lengths(seen.flows).clamp_min(STILL) for seen in (clips, teacher))
    found = {
        "content": cosine_distance(ours.frames, theirs.frames).mean(1),
        "motion": cosine_distance(ours.motion, theirs.motion),
        "flow_error": flow_lengths(clips.flows - teacher.flows),
        "flow_change": (length / of_teacher).log().abs(),
        "clip_mse": (clips.clips - teacher.clips).square().mean((1, 2, 3, 4)),
    }
    return {name: value.float().cpu() for name, value in found.items()}


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of vectors [..., D], computed as |a/|a| - b/|b||^2 / 2, which is exactly 0 for equal ones."""
    unit_a, unit_b = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (a, b))
    return (unit_a - unit_b).square().sum(-1) / 2


def estimate(values: Sequence[float] | npt.NDArray[np.float64], seed: int = 0, confidence: float = 0.95) -> Estimate:
    """Mean of one value a prompt with its percentile bootstrap interval (Efron 1979), RESAMPLES draws of the seed."""
    found = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(found), (RESAMPLES, len(found)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(found[draws].mean(1), [tail, 1 - tail])
    return Estimate(value=float(found.mean()), low=float(low), high=float(high))


def motion_share(unit: UnitScore) -> float | None:
    """Motion's share of a unit's damage, in [0, 1]; None where both damages are harmless."""
    if max(unit.content.value, unit.motion.value) < HARMLESS:
        return None
    return unit.motion.value / (unit.content.value + unit.motion.value)
