"""Draws the plan and training curves, and writes figures to files and HTML pages in the house's colours."""

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vdmini_core.artifacts import Plan

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
CURVES = {
    "train/student/total": "Student: total loss",
    "train/student/task": "Student: task loss",
    "train/student/icd": "Student: individual content distillation (ICD)",
    "train/student/mca": "Student: multi-frame content adversarial (MCA)",
    "train/discriminator/total": "Discriminator: total loss",
}


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


def plain_axes(axes: Axes) -> None:
    """Horizontal grid lines and little else."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
