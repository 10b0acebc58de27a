"""Draws a plan: kept and removed units along the network, what each is worth and costs, and the Pareto front."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from vdmini_core.artifacts import Cost, Estimate, Plan, UnitScore
from vdmini_core.evaluation.plots import CONTENT, COST, INK, MOTION, PAPER, REMOVED, plain_axes, save_figure
from vdmini_core.models import Unit

MARKERS = "sDv^P"
HATCH = "////"


def plot_plan(
    plan: Plan, units: Sequence[Unit], scores: Sequence[UnitScore], costs: Mapping[str, Cost], target: Path
) -> None:
    """Write the plan's figure; the suffix of `target` (.png or .svg) chooses the format."""
    save_figure(plan_figure(plan, units, scores, costs), target)


def plan_figure(plan: Plan, units: Sequence[Unit], scores: Sequence[UnitScore], costs: Mapping[str, Cost]) -> Figure:
    """The network over bars for each unit (damage, parameters, latency), beside the front where there is one."""
    names = [unit.name for unit in units]
    columns = 2 if plan.front else 1
    width = max(6.5, 0.3 * len(names))
    figure = Figure(figsize=(width + 4.5 * (columns - 1), 7.4), layout="constrained", facecolor=PAPER)
    grid = figure.add_gridspec(4, columns, height_ratios=(1.5, 1.6, 1, 1), width_ratios=(width, 4.5)[:columns])
    drawing = figure.add_subplot(grid[0, 0])
    _draw_network(drawing, units, plan.removed)
    drawing.set_title(
        f"Plan {plan.method}: {len(plan.removed)} of {len(names)} units go", loc="left", fontsize=11, color=INK
    )
    damage, size, time = (figure.add_subplot(grid[row, 0], sharex=drawing) for row in (1, 2, 3))
    by_name = {score.name: score for score in scores}
    _bars(damage, [_value(by_name, name, "content") for name in names], CONTENT, -0.2, 0.38, "")
    _bars(damage, [_value(by_name, name, "motion") for name in names], MOTION, 0.2, 0.38, HATCH)
    damage.set_ylabel("Damage of\nbypassing it alone", color=INK)
    _bars(size, [costs[name].parameters / 1e6 for name in names], COST, 0, 0.6, "")
    size.set_ylabel("Parameters\n(M)", color=INK)
    _bars(time, [costs[name].latency_ms or 0.0 for name in names], COST, 0, 0.6, "")
    time.set_ylabel("Latency\n(ms)", color=INK)
    for panel in (damage, size, time):
        for index, name in enumerate(names):
            if name in plan.removed:
                panel.axvspan(index - 0.5, index + 0.5, color=REMOVED, linewidth=0, zorder=0)
        panel.tick_params(labelbottom=panel is time)
    time.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    time.set_xlim(-0.6, len(names) - 0.4)
    if plan.front:
        _draw_front(figure.add_subplot(grid[:, 1]), plan)
    handles = [
        Patch(facecolor=CONTENT, label="content"),
        Patch(facecolor=MOTION, edgecolor=PAPER, hatch=HATCH, label="motion"),
        Patch(facecolor=COST, label="kept"),
        Patch(facecolor=REMOVED, edgecolor=INK, label="× removed"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, labelcolor=INK)
    return figure


def _value(scores: Mapping[str, UnitScore], name: str, side: str) -> float:
    estimate: Estimate | None = getattr(scores.get(name), side, None)
    return 0.0 if estimate is None else estimate.value


def _bars(axes: Axes, values: Sequence[float], colour: str, shift: float, width: float, hatch: str) -> None:
    places = [index + shift for index in range(len(values))]
    axes.bar(places, values, width, color=colour, edgecolor=PAPER, hatch=hatch, linewidth=0)
    plain_axes(axes)


def _draw_network(axes: Axes, units: Sequence[Unit], removed: Sequence[str]) -> None:
    """A box a unit in forward order; a U-Net's stages lie below one another, a transformer's lists side by side."""
    has_stages = any(unit.block != unit.name for unit in units)
    levels = [-unit.depth if has_stages else 0 for unit in units]
    for index, (unit, level) in enumerate(zip(units, levels, strict=True)):
        gone = unit.name in removed
        face, edge = (REMOVED, INK) if gone else (COST, COST)
        axes.add_patch(Rectangle((index - 0.4, level - 0.4), 0.8, 0.8, facecolor=face, edgecolor=edge))
        if gone:
            axes.text(index, level, "×", ha="center", va="center", color=INK, fontsize=10)
    if len(units) > 1:
        axes.plot(range(len(units)), levels, color=INK, linewidth=0.6, zorder=0)
    for block in dict.fromkeys(unit.block if has_stages else unit.name.split(".")[0] for unit in units):
        places = [i for i, unit in enumerate(units) if block in (unit.block, unit.name.split(".")[0])]
        top = levels[places[0]] + 0.55
        axes.text(sum(places) / len(places), top, block, ha="center", color=INK, fontsize=8)
    axes.set_ylim(min(levels) - 0.6, max(levels) + 1.1)
    axes.set_axis_off()


def _draw_front(axes: Axes, plan: Plan) -> None:
    """Least damage for every budget, the plan, and what other methods would do."""

    def place(predicted: object) -> tuple[float, float]:
        return float(getattr(predicted, plan.budget)), float(getattr(predicted, "damage", None) or 0.0)

    points = [place(other.predicted) for other in plan.front]
    axes.plot(
        *zip(*points, strict=True), color=CONTENT, marker="o", markersize=3, drawstyle="steps-post", label="front"
    )
    for marker, (name, other) in zip(MARKERS, plan.named.items(), strict=False):
        x, y = place(other.predicted)
        axes.plot(x, y, marker=marker, linestyle="", color=COST, markeredgecolor=INK, markersize=7, label=name)
    if plan.predicted:
        x, y = place(plan.predicted)
        axes.plot(x, y, marker="*", linestyle="", color=MOTION, markeredgecolor=INK, markersize=14, label=plan.method)
    if plan.ratio is not None:
        axes.axvline(plan.ratio, color=INK, linewidth=0.8, linestyle="--", label="budget")
    plain_axes(axes)
    axes.set_title("Least predicted damage for every budget", loc="left", fontsize=11, color=INK)
    axes.set_xlabel(f"{plan.budget} left (share of the teacher's)", color=INK)
    axes.set_ylabel("weighted damage, sum over removed units", color=INK)
    axes.legend(frameon=False, labelcolor=INK)
