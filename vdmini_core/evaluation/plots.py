"""Draws the sensitivity of every block and pair, the plan, and training curves, for files and for HTML pages."""

import io
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vdmini_core.artifacts import Plan, Quality, SensitivityReport, UnitScore

# Okabe and Ito's blue and vermilion differ for every common colour vision; motion is hatched as well.
INK, PAPER, GRID = "#1b2331", "#fefefe", "#d6dae1"
CONTENT, MOTION, COST, REMOVED = "#0072b2", "#d55e00", "#7b838e", "#f4e3b5"
# Inline SVG takes its colours from the page, so that it follows light and dark.
PAGE_COLOURS = {
    INK: "var(--ink)",
    PAPER: "var(--card)",
    GRID: "var(--line)",
    CONTENT: "var(--content)",
    MOTION: "var(--motion)",
    COST: "var(--cost)",
    REMOVED: "var(--removed)",
}
SUFFIXES = (".png", ".svg")
PANEL_TITLES = {"block": "Whole blocks bypassed", "pair": "Single R-A pairs bypassed"}
CURVES = {
    "train/student/total": "Student: total loss",
    "train/student/task": "Student: task loss",
    "train/student/icd": "Student: individual content distillation (ICD)",
    "train/student/mca": "Student: multi-frame content adversarial (MCA)",
    "train/discriminator/total": "Discriminator: total loss",
}


def plot_sensitivity(report: SensitivityReport, target: Path, removed: Collection[str] = ()) -> None:
    """Draw what bypassing each unit costs and what the unit itself costs; mark `removed` units.

    The suffix of `target` (.png or .svg) chooses the format.
    """
    save_figure(sensitivity_figure(report, removed), target)


def sensitivity_figure(report: SensitivityReport, removed: Collection[str] = ()) -> Figure:
    """One column of panels per kind (block, pair): loss of quality, parameters, latency."""
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
    with_accuracy = has_accuracies(report)
    for column, (kind, scores) in enumerate(zip(kinds, columns, strict=True)):
        top, middle, bottom = axes[:, column]
        top.set_title(PANEL_TITLES.get(kind, kind), loc="left", fontsize=11, fontweight="bold", color=INK)
        _draw_losses(top, scores, report.baseline, with_accuracy)
        middle.bar(range(len(scores)), [score.parameters / 1e6 for score in scores], 0.6, color=COST)
        bottom.bar(range(len(scores)), [score.latency_ms for score in scores], 0.6, color=COST)
        for panel in (top, middle, bottom):
            _finish(panel, scores, gone)
    unit = "points" if with_accuracy else "toy Frechet distance,\nown evaluator"
    axes[0, 0].set_ylabel(f"{'Drop in accuracy' if with_accuracy else 'Rise of distance'}\n({unit})", color=INK)
    axes[1, 0].set_ylabel("Parameters\n(M)", color=INK)
    axes[2, 0].set_ylabel("Latency\n(ms)", color=INK)
    handles = [
        Patch(facecolor=CONTENT, label="content"),
        Patch(facecolor=MOTION, edgecolor=PAPER, hatch="////", label="motion"),
    ]
    if gone:
        handles.append(Patch(facecolor=REMOVED, label="× removed by the plan"))
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, labelcolor=INK)
    figure.align_ylabels()
    return figure


def has_accuracies(report: SensitivityReport) -> bool:
    """Whether every accuracy is known; otherwise the distances have to speak."""
    qualities = [report.baseline, *(score.quality for score in report.scores)]
    return all(q.content_accuracy is not None and q.motion_accuracy is not None for q in qualities)


def whole_removals(scores: Sequence[UnitScore], removed: Collection[str]) -> set[str]:
    """`removed` and the blocks all of whose pairs are removed."""
    gone = set(removed)
    for block in (score.name for score in scores if score.kind == "block"):
        pairs = [score.name for score in scores if score.kind == "pair" and score.name.startswith(f"{block}.")]
        if pairs and set(pairs) <= gone:
            gone.add(block)
    return gone


def plan_row(plan: Plan, depths: Mapping[str, int]) -> str:
    """The plan as an HTML list of blocks in graph order, removed units struck out.

    `depths` (unit or block -> stage from the outermost) lets the page set deeper blocks lower.
    """
    blocks: dict[str, list[str]] = {}
    for unit in sorted({*plan.kept, *plan.removed}, key=_graph_order):
        blocks.setdefault(".".join(unit.split(".")[:2]), []).append(unit)
    items = []
    for block, units in blocks.items():
        chips = "".join(_chip(unit, unit in plan.removed) for unit in units)
        depth = depths.get(block, depths.get(units[0], 0))
        items.append(f'<li style="--depth: {depth}"><strong>{escape(block)}</strong><ul>{chips}</ul></li>')
    return f'<ul class="plan">{"".join(items)}</ul>'


def _graph_order(unit: str) -> list[tuple[bool, int, str]]:
    """D before M before U, numbers by value: the order in which the network runs its units."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in unit.split(".")]


def _chip(unit: str, gone: bool) -> str:
    if gone:
        return f'<li><del class="pair"><span class="hidden">removed: </span>{escape(unit)}</del></li>'
    return f'<li><span class="pair">{escape(unit)}</span></li>'


def training_figures(records: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    """Title -> figure for every curve of CURVES that `records` (rows of "step" and losses) contain."""
    figures = {}
    for key, title in CURVES.items():
        points = [(row["step"], row[key]) for row in records if key in row and math.isfinite(row[key])]
        if points:
            figures[title] = _curve([step for step, _ in points], [value for _, value in points])
    return figures


def _curve(steps: Sequence[float], values: Sequence[float]) -> Figure:
    """One loss over the steps, with its running mean where there are enough points to average."""
    figure = Figure(figsize=(3.6, 2.1), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    window = max(1, len(values) // 10)
    marker = "o" if len(values) == 1 else ""
    raw_colour, raw_width = (COST, 0.8) if window > 1 else (CONTENT, 1.8)
    axes.plot(steps, values, color=raw_colour, linewidth=raw_width, marker=marker)
    if window > 1:
        means = [math.fsum(values[i - window : i]) / window for i in range(window, len(values) + 1)]
        centres = steps[window // 2 : window // 2 + len(means)]
        axes.plot(centres, means, color=CONTENT, linewidth=1.8)
    plain_axes(axes)
    axes.set_xlabel("step", color=INK, fontsize=9)
    return figure


def save_figure(figure: Figure, target: Path) -> None:
    """Write PNG or SVG by suffix, under a temporary name first."""
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target} ends in {target.suffix!r}; a plot is written as one of {', '.join(SUFFIXES)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.partial")
    with _svg_style():
        figure.savefig(draft, format=target.suffix[1:], dpi=150, metadata=_undated(target.suffix[1:]))
    os.replace(draft, target)


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for an HTML page that defines the variables of PAGE_COLOURS.

    `name` keeps the ids of several figures on one page apart; `description` is the text alternative.
    """
    stream = io.StringIO()
    with _svg_style():
        figure.savefig(stream, format="svg", metadata=_undated("svg"))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)


def _svg_style() -> AbstractContextManager[None]:
    """Text stays text (small, selectable), and equal figures give equal bytes."""
    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vdmini"})


def _undated(kind: str) -> dict[str, Any] | None:
    return {"Date": None} if kind == "svg" else None


def _draw_losses(axes: Axes, scores: Sequence[UnitScore], baseline: Quality, with_accuracy: bool) -> None:
    losses = [loss_of_quality(score.quality, baseline, with_accuracy) for score in scores]
    left, right = [i - 0.2 for i in range(len(scores))], [i + 0.2 for i in range(len(scores))]
    axes.bar(left, [content for content, _ in losses], 0.38, color=CONTENT)
    axes.bar(right, [motion for _, motion in losses], 0.38, color=MOTION, edgecolor=PAPER, hatch="////", linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8)


def loss_of_quality(quality: Quality, baseline: Quality, with_accuracy: bool) -> tuple[float, float]:
    """(content, motion): accuracy lost in percentage points, or distance gained; positive is worse."""
    if with_accuracy:
        pairs = (
            (baseline.content_accuracy, quality.content_accuracy),
            (baseline.motion_accuracy, quality.motion_accuracy),
        )
        content, motion = (
            100 * (before - after) for before, after in pairs if before is not None and after is not None
        )
        return content, motion
    return (
        quality.content_distance - baseline.content_distance,
        quality.motion_distance - baseline.motion_distance,
    )


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


def plain_axes(axes: Axes) -> None:
    """Horizontal grid lines and little else."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
