"""What an official evaluation came to: scores with intervals, or what is incomplete and why."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vdmini_core.artifacts import Provenance, Record
from vdmini_core.evaluation.vbench.flicker import Flickering
from vdmini_core.evaluation.vbench.official import Attempt
from vdmini_core.evaluation.vbench.scores import SUITES, Scores, aggregate
from vdmini_core.evaluation.vbench.suite import Suite

DRAWS, LEVEL, SEED = 2000, 0.95, 0


class VBenchReport(Record):
    """The result. `subset` is the prompts a dimension where not all were taken: then it is no leaderboard figure.

    `intervals` are of each scored dimension (0 to 1), the groups and the total (percent). `native_flickering` is
    temporal_flickering computed here of the same videos; it takes part in no total.
    """

    suite: str
    subset: int | None
    scores: Scores
    intervals: dict[str, tuple[float, float]]
    attempts: dict[str, Attempt]
    native_flickering: float | None
    protocol: dict[str, Any]
    protocol_digest: str
    provenance: Provenance


def vbench_report(
    suite: Suite,
    attempts: Mapping[str, Attempt],
    flickering: Flickering | None,
    protocol: dict[str, Any],
    protocol_digest: str,
    provenance: Provenance,
) -> VBenchReport:
    """Put the attempts together; only what was scored counts."""
    scores = {name: a.score for name, a in attempts.items() if a.scored and a.score is not None}
    return VBenchReport(
        suite=suite.name,
        subset=suite.per_dimension,
        scores=aggregate(scores, suite.name),
        intervals=bootstrap_intervals(suite.name, {name: attempts[name] for name in scores}),
        attempts=dict(attempts),
        native_flickering=None if flickering is None else flickering.score,
        protocol=protocol,
        protocol_digest=protocol_digest,
        provenance=provenance,
    )


def bootstrap_intervals(suite: str, attempts: Mapping[str, Attempt]) -> dict[str, tuple[float, float]]:
    """95% percentile intervals over prompts: each dimension's prompts are drawn anew, and the groups follow.

    A dimension's draws are shifted so that they are around the official score, which may weigh videos differently. A
    dimension whose official result has no number a video, or one prompt, has none, nor have its group and the total.
    """
    rng = np.random.default_rng(SEED)
    draws: dict[str, npt.NDArray[np.float64]] = {}
    for name, attempt in attempts.items():
        values = np.array(list(attempt.per_prompt.values()))
        if len(values) > 1 and attempt.score is not None:
            picked = values[rng.integers(0, len(values), (DRAWS, len(values)))].mean(1)
            draws[name] = attempt.score + picked - values.mean()
    columns = [aggregate({name: float(d[index]) for name, d in draws.items()}, suite) for index in range(DRAWS)]
    for name in (*SUITES[suite], "total"):
        if getattr(columns[0], name) is not None:
            draws[name] = np.array([getattr(column, name) for column in columns])
    tail = (1 - LEVEL) / 2
    return {name: (float(np.quantile(d, tail)), float(np.quantile(d, 1 - tail))) for name, d in draws.items()}


def report_text(report: VBenchReport) -> str:
    """The report for a person: groups and total first, then every dimension, then what to mend."""
    lines = []
    if report.subset is not None:
        lines.append(f"SUBSET: {report.subset} prompts a dimension; not comparable with the leaderboard or a whole run")
    for name in (*SUITES[report.suite], "total"):
        value = getattr(report.scores, name)
        shown = "incomplete" if value is None else f"{value:.2f}"
        lines.append(f"{name:24}{shown}{_interval(report, name)}")
    for name, attempt in report.attempts.items():
        shown = f"{attempt.score:.4f}" if attempt.score is not None else attempt.status
        lines.append(f"  {name:22}{shown}{_interval(report, name)}")
    if report.native_flickering is not None:
        lines.append(f"  temporal_flickering computed here: {report.native_flickering:.4f}")
    for name, attempt in report.attempts.items():
        if not attempt.scored:
            lines.append(f"{name} is incomplete ({attempt.status}): {attempt.reason} Log: {attempt.log}")
    return "\n".join(lines)


def _interval(report: VBenchReport, name: str) -> str:
    if name not in report.intervals:
        return ""
    low, high = report.intervals[name]
    return f"  [{low:.4g}, {high:.4g}]"
