"""The ablation of the loss: its arms, and what their seeds say of them; means, paired differences, table and plot.

The paper (arXiv 2411.18375, Table 4) trained every arm once. Here an arm is trained once a seed; arms share the
seeds, and with them the clips, noise levels and noise of every step, so differences are taken seed by seed.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from scipy.stats import t as student_t

from vdmini_core.artifacts import Provenance, Quality, Record
from vdmini_core.evaluation.plots import CONTENT, COST, INK, MOTION, PAPER, plain_axes, save_figure
from vdmini_core.settings import DistillSettings, Settings

ARMS: dict[str, tuple[bool, bool]] = {
    "task": (False, False),
    "task+icd": (True, False),
    "task+mca": (False, True),
    "task+icd+mca": (True, True),
}
"""Arm -> whether it has the ICD and the MCA loss; the first one is what the others are compared with."""
BASE = next(iter(ARMS))
REFERENCES = ("teacher", "pruned")
"""What is judged beside the arms: where they should come to, and where they start."""
MEASURES = {
    "content_accuracy": "content accuracy",
    "motion_accuracy": "motion accuracy",
    "content_distance": "content distance",
    "motion_distance": "motion distance",
}
LEVEL = 0.95


class AblationSettings(Settings):
    """How large the ablation is; the weights of the losses and everything else are those of params.yaml."""

    seeds: int = Field(3, ge=1, description="trainings of every arm; the first seed is distill.loop.seed")
    steps: int = Field(gt=0, description="of every training")
    clips: int = Field(gt=1, description="on which every student is judged")

    def parts(self, first_seed: int) -> dict[str, tuple[str, int | None]]:
        """Name of every row -> its arm or reference, and its seed; a seed's arms follow one another."""
        found: dict[str, tuple[str, int | None]] = {name: (name, None) for name in REFERENCES}
        for seed in range(first_seed, first_seed + self.seeds):
            found |= {f"{arm}-seed{seed}": (arm, seed) for arm in ARMS}
        return found


class AblationRow(Record):
    """One judged network; `seed` is None and `steps` 0 for the teacher and the pruned student.

    `fingerprint` names everything the row depends on: another one means that it has to be made again.
    """

    arm: str
    seed: int | None
    steps: int
    quality: Quality
    protocol: dict[str, Any]
    protocol_digest: str
    fingerprint: str
    provenance: Provenance


class Interval(Record):
    """A mean over seeds with its two-sided 95% t-interval, None for one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


class ArmResult(Record):
    """What an arm reaches, and by how much that differs from the task loss alone, by measure; {} for that arm."""

    arm: str
    means: dict[str, Interval]
    differences: dict[str, Interval]


class AblationReport(Record):
    """The result; measures that the clips have no labels for are left out."""

    settings: dict[str, Any]
    protocol: dict[str, Any]
    protocol_digest: str
    references: dict[str, Quality]
    arms: tuple[ArmResult, ...]
    rows: tuple[AblationRow, ...]
    provenance: Provenance


def check_weights(settings: DistillSettings) -> None:
    """ValueError where two arms would be the same training."""
    for name in ("icd_weight", "mca_weight"):
        if getattr(settings, name) == 0:
            raise ValueError(
                f"distill.{name} is 0 in params.yaml, so arms with and without this loss would be the same; set it to "
                "the weight that is to be compared with 0"
            )


def arm_settings(settings: DistillSettings, arm: str, seed: int, steps: int) -> DistillSettings:
    """The settings of one training: `settings` but for its length, its seed and the losses the arm is without.

    Raises pydantic's ValidationError, a ValueError, where those do not go together.
    """
    icd, mca = ARMS[arm]
    return DistillSettings.model_validate(
        {
            **settings.model_dump(),
            "loop": {**settings.loop.model_dump(), "seed": seed, "max_steps": steps},
            "icd_weight": settings.icd_weight if icd else 0.0,
            "mca_weight": settings.mca_weight if mca else 0.0,
        }
    )


def interval(values: Sequence[float]) -> Interval:
    """Mean and mean +- t_{.975, n - 1} s / sqrt(n), s the sample standard deviation."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean=mean, low=None, high=None, seeds=len(values))
    quantile = float(student_t.ppf((1 + LEVEL) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half, seeds=len(values))


def ablation_report(rows: Sequence[AblationRow], settings: AblationSettings, provenance: Provenance) -> AblationReport:
    """Put the rows together; ValueError where they were not judged alike."""
    first = rows[0]
    for row in rows:
        if row.protocol_digest != first.protocol_digest:
            raise ValueError(
                f"the row of {row.arm}, seed {row.seed}, was judged by another protocol than that of {first.arm}; "
                "run the ablation again"
            )
    values = {(row.arm, row.seed): row.quality for row in rows}
    seeds = sorted({row.seed for row in rows if row.seed is not None})
    measures = [name for name in MEASURES if all(getattr(row.quality, name) is not None for row in rows)]

    def of_seeds(arm: str, measure: str) -> list[float]:
        return [float(getattr(values[arm, seed], measure)) for seed in seeds]

    def differences(arm: str, measure: str) -> list[float]:
        return [a - b for a, b in zip(of_seeds(arm, measure), of_seeds(BASE, measure), strict=True)]

    return AblationReport(
        settings=settings.model_dump(mode="json"),
        protocol=first.protocol,
        protocol_digest=first.protocol_digest,
        references={name: values[name, None] for name in REFERENCES},
        arms=tuple(
            ArmResult(
                arm=arm,
                means={name: interval(of_seeds(arm, name)) for name in measures},
                differences={} if arm == BASE else {name: interval(differences(arm, name)) for name in measures},
            )
            for arm in ARMS
        ),
        rows=tuple(rows),
        provenance=provenance,
    )


def ablation_table(report: AblationReport) -> str:
    """The report as one markdown table: references, means of the arms, and their differences to the task loss."""
    measures = list(report.arms[0].means)
    steps, seeds, clips = (report.settings[name] for name in ("steps", "seeds", "clips"))
    head = [f"{steps} steps, N = {clips}, seeds: {seeds}", *(MEASURES[name] for name in measures)]
    lines = [head, ["---"] * len(head)]
    for name, quality in report.references.items():
        lines.append([name, *(_digits(measure, float(getattr(quality, measure))) for measure in measures)])
    for arm in report.arms:
        lines.append([arm.arm, *(_cell(measure, arm.means[measure]) for measure in measures)])
    for arm in report.arms[1:]:
        cells = [_cell(measure, arm.differences[measure], "+") for measure in measures]
        lines.append([f"{arm.arm} minus {BASE}", *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    spread = "means over seeds with 95% t-intervals" if seeds > 1 else "one seed, so nothing is known of their spread"
    return (
        f"{table}\n\nArms: {spread}; differences are taken seed by seed. Accuracy: more is better, distance: less. "
        "Distances are toy Frechet distances of the offline evaluator, comparable with nothing published.\n"
    )


def _digits(measure: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if measure.endswith("accuracy") else f"{value:{sign}.2f}"


def _cell(measure: str, found: Interval, sign: str = "") -> str:
    mean = _digits(measure, found.mean, sign)
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{_digits(measure, found.low, sign)}, {_digits(measure, found.high, sign)}]"


def ablation_metrics(report: AblationReport) -> dict[str, float]:
    """The means and the differences of the arms, for a tracker; MLflow takes no + in a name."""
    found: dict[str, float] = {}
    for arm in report.arms:
        for kind, values in (("mean", arm.means), ("difference", arm.differences)):
            found |= {f"ablation/{m}/{kind}/{arm.arm.replace('+', '-')}": v.mean for m, v in values.items()}
    return found


def plot_ablation(report: AblationReport, target: Path) -> None:
    """Draw every seed, mean and interval of every arm by measure, the references as lines."""
    measures = list(report.arms[0].means)
    figure = Figure(figsize=(9.0, 3.1 * math.ceil(len(measures) / 2)), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(math.ceil(len(measures) / 2), 2, squeeze=False)
    for panel, measure in zip(axes.flat, measures, strict=True):
        _draw(panel, report, measure)
    save_figure(figure, target)


def _draw(panel: Axes, report: AblationReport, measure: str) -> None:
    colour = CONTENT if measure.startswith("content") else MOTION
    for place, arm in enumerate(report.arms):
        seeds = [float(getattr(row.quality, measure)) for row in report.rows if row.arm == arm.arm]
        panel.plot([place + 0.12] * len(seeds), seeds, "o", color=COST, markersize=4)
        found = arm.means[measure]
        half = 0.0 if found.high is None else found.high - found.mean
        panel.errorbar([place - 0.12], [found.mean], [half], fmt="s", color=colour, capsize=4)
    for name, style in zip(REFERENCES, ("-", ":"), strict=True):
        level = float(getattr(report.references[name], measure))
        panel.axhline(level, color=INK, linewidth=0.8, linestyle=style)
        panel.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    better = "more is better" if measure.endswith("accuracy") else "less is better"
    panel.set_title(f"{MEASURES[measure]} ({better})", loc="left", fontsize=10, color=INK)
    panel.set_xticks(range(len(report.arms)), [arm.arm for arm in report.arms])
    panel.set_xlim(-0.5, len(report.arms) - 0.5)
    plain_axes(panel)
