"""Draws what every block and pair is worth: bars a unit, and damage against depth."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vdmini_core.artifacts import Estimate, SensitivityReport, UnitScore
from vdmini_core.evaluation.metrics.paired import motion_share
from vdmini_core.evaluation.plots import CONTENT, COST, INK, MOTION, PAPER, REMOVED, plain_axes, save_figure

PANEL_TITLES = {"block": "Whole blocks bypassed", "pair": "Single R-A pairs bypassed"}
DAMAGE = "Damage\n(1 - cosine to the teacher's clip)"


def plot_sensitivity(report: SensitivityReport, target: Path, removed: Collection[str] = ()) -> None:
    """Draw what bypassing each unit costs and what the unit itself costs; mark `removed` units.

    The suffix of `target` (.png or .svg) chooses the format.
    """
    save_figure(sensitivity_figure(report, removed), target)


def plot_depth(report: SensitivityReport, target: Path) -> None:
    """Draw content and motion damage against depth; the suffix of `target` chooses the format."""
    save_figure(depth_figure(report), target)


def sensitivity_figure(report: SensitivityReport, removed: Collection[str] = ()) -> Figure:
    """One column of panels per kind (block, pair): damage with its interval, parameters, latency."""
    if not report.scores:
        raise ValueError("the sensitivity report holds no scores; run the sensitivity stage on at least one unit")
    kinds = sorted({score.kind for score in report.scores})
    columns = [[score for score in report.scores if score.kind == kind] for kind in kinds]
    counts = [max(len(scores), 4) for scores in columns]
    figure = Figure(figsize=(max(7.0, 0.46 * sum(counts)), 6.6), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(
        3,
        len(kinds),
        squeeze=False,
        sharey="row",
        sharex="col",
        gridspec_kw={"width_ratios": counts, "height_ratios": (2.4, 1, 1)},
    )
    gone = whole_removals(report.scores, removed)
    for column, (kind, scores) in enumerate(zip(kinds, columns, strict=True)):
        top, middle, bottom = axes[:, column]
        top.set_title(PANEL_TITLES.get(kind, kind), loc="left", fontsize=11, fontweight="bold", color=INK)
        _draw_damages(top, scores)
        middle.bar(range(len(scores)), [score.parameters / 1e6 for score in scores], 0.6, color=COST)
        bottom.bar(range(len(scores)), [score.latency_ms for score in scores], 0.6, color=COST)
        for panel in (top, middle, bottom):
            _finish(panel, scores, gone)
    axes[0, 0].set_ylabel(DAMAGE, color=INK)
    axes[1, 0].set_ylabel("Parameters\n(M)", color=INK)
    axes[2, 0].set_ylabel("Latency\n(ms)", color=INK)
    handles = _legend()
    if gone:
        handles.append(Patch(facecolor=REMOVED, label="× removed by the plan"))
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, labelcolor=INK)
    figure.align_ylabels()
    return figure


def depth_figure(report: SensitivityReport) -> Figure:
    """Left the damages of single units against their depth, right motion's share of what is done; lines are means."""
    blocks = {score.name for score in report.scores if any(s.name.startswith(f"{score.name}.") for s in report.scores)}
    units = list({score.name: score for score in report.scores if score.name not in blocks}.values())
    figure = Figure(figsize=(9.0, 3.6), layout="constrained", facecolor=PAPER)
    left, right = figure.subplots(1, 2)
    for offset, colour, marker, measure in ((-0.08, CONTENT, "o", "content"), (0.08, MOTION, "^", "motion")):
        found = [getattr(unit, measure) for unit in units]
        places = [unit.depth + offset for unit in units]
        left.errorbar(
            places,
            [e.value for e in found],
            _whiskers(found),
            fmt=marker,
            color=colour,
            markersize=5,
            elinewidth=0.9,
        )
        _join_means(left, [unit.depth for unit in units], [e.value for e in found], colour)
    left.set_yscale("symlog", linthresh=0.01)
    left.set_ylim(bottom=0)
    left.set_ylabel(DAMAGE, color=INK)
    shares = [(unit.depth, share) for unit in units if (share := motion_share(unit)) is not None]
    right.plot([depth for depth, _ in shares], [share for _, share in shares], "D", color=INK, markersize=5)
    _join_means(right, [depth for depth, _ in shares], [share for _, share in shares], INK)
    right.axhline(0.5, color=COST, linewidth=0.8, linestyle=":")
    right.set_ylim(0, 1)
    right.set_ylabel("Motion's share of the damage", color=INK)
    for panel in (left, right):
        plain_axes(panel)
        panel.set_xlabel("depth (0: outermost)", color=INK)
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(handles=_legend(), loc="outside upper left", ncols=2, frameon=False, labelcolor=INK)
    return figure


def whole_removals(scores: Sequence[UnitScore], removed: Collection[str]) -> set[str]:
    """`removed` and the blocks all of whose pairs are removed."""
    gone = set(removed)
    for block in (score.name for score in scores if score.kind == "block"):
        pairs = [score.name for score in scores if score.kind == "pair" and score.name.startswith(f"{block}.")]
        if pairs and set(pairs) <= gone:
            gone.add(block)
    return gone


def _legend() -> list[Patch]:
    content = Patch(facecolor=CONTENT, label="content")
    return [content, Patch(facecolor=MOTION, edgecolor=PAPER, hatch="////", label="motion")]


def _whiskers(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far each interval reaches below and above its value."""
    below = [max(e.value - e.low, 0.0) for e in estimates]
    return [below, [max(e.high - e.value, 0.0) for e in estimates]]


def _join_means(axes: Axes, depths: Sequence[int], values: Sequence[float], colour: str) -> None:
    places = sorted(set(depths))
    means = [float(np.mean([v for d, v in zip(depths, values, strict=True) if d == place])) for place in places]
    axes.plot(places, means, color=colour, linewidth=1.4, alpha=0.7)


def _draw_damages(axes: Axes, scores: Sequence[UnitScore]) -> None:
    """Bars with the intervals over prompts."""
    for offset, measure, style in (
        (-0.2, "content", {"color": CONTENT}),
        (0.2, "motion", {"color": MOTION, "edgecolor": PAPER, "hatch": "////", "linewidth": 0}),
    ):
        found = [getattr(score, measure) for score in scores]
        places = [index + offset for index in range(len(scores))]
        axes.bar(places, [e.value for e in found], 0.38, **style)
        axes.errorbar(places, [e.value for e in found], _whiskers(found), fmt="none", ecolor=INK, elinewidth=0.9)
    axes.axhline(0, color=INK, linewidth=0.8)


def _finish(axes: Axes, scores: Sequence[UnitScore], gone: set[str]) -> None:
    """Ticks named by unit, removed units shaded and crossed."""
    for index, score in enumerate(scores):
        if score.name in gone:
            axes.axvspan(index - 0.5, index + 0.5, color=REMOVED, linewidth=0, zorder=0)
    names = [f"{score.name}\n×" if score.name in gone else score.name for score in scores]
    upright = max(len(score.name) for score in scores) <= 5
    axes.set_xticks(range(len(scores)), names, rotation=0 if upright else 90, fontsize=9)
    for tick, score in zip(axes.xaxis.get_major_ticks(), scores, strict=True):
        tick.label1.set_fontweight("bold" if score.name in gone else "normal")
    axes.set_xlim(-0.6, len(scores) - 0.4)
    plain_axes(axes)
