"""A study for readers: the table of its arms, the ranking of a probe, and a plot of every seed."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vdmini_core.evaluation.plots import CONTENT, COST, INK, MOTION, PAPER, plain_axes, save_figure
from vdmini_core.evaluation.study import MEASURES, TEACHER, Agreement, Interval, Ranking, StudyReport

EQUAL = 0.01
"""Networks whose parameters differ by more are not of equal size."""


def study_table(report: StudyReport) -> str:
    """The report as one markdown table: untrained networks, means of the arms, and their differences to the base."""
    measures = list(report.arms[0].means)
    steps, seeds, clips = (report.study[name] for name in ("steps", "seeds", "clips"))
    sizes = {row.arm: row.parameters for row in report.rows}
    base = report.arms[0]
    head = [f"{steps} steps, N = {clips}, seeds: {seeds}", "parameters", *(MEASURES[name] for name in measures)]
    lines = [head, ["---"] * len(head)]
    for name, quality in report.references.items():
        cells = [_digits(measure, float(getattr(quality, measure))) for measure in measures]
        lines.append([_spoken(name), _millions(sizes[name]), *cells])
    for arm in report.arms:
        cells = [_cell(measure, arm.means[measure]) for measure in measures]
        lines.append([arm.arm, _millions(arm.parameters), *cells])
    for arm in report.arms[1:]:
        cells = [_cell(measure, arm.differences[measure], "+") for measure in measures]
        lines.append([f"{arm.arm} minus {base.arm}", "", *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    spread = "means over seeds with 95% t-intervals" if seeds > 1 else "one seed, so nothing is known of their spread"
    odd = [
        f"{arm.arm} has {arm.parameters / base.parameters - 1:+.1%} parameters against {base.arm}, so it is no equal."
        for arm in report.arms
        if abs(arm.parameters / base.parameters - 1) > EQUAL
    ]
    return (
        f"{table}\n\nArms: {spread}; differences are taken seed by seed. Accuracy: more is better, distance: less. "
        "Distances are toy Frechet distances of the offline evaluator, comparable with nothing published."
        f"{''.join(f' {line}' for line in odd)}\n"
    )


def ranking_table(ranking: Ranking) -> str:
    """The plans of a probe in the order that recovery gave them, and what was known before."""

    def shown(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.3f}"

    def said(found: Agreement) -> str:
        return f"Kendall {shown(found.kendall)}, Spearman {shown(found.spearman)} ({found.plans} plans)"

    lines = ["| rank | plan | predicted damage | score before | score after | removed |", "|---|---|---|---|---|---|"]
    for place, plan in enumerate(ranking.plans, 1):
        cells = (shown(plan.predicted), shown(plan.pruned), shown(plan.recovered), ", ".join(plan.removed))
        lines.append(f"| {place} | {plan.name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Order after {ranking.steps} steps against the predicted one: {said(ranking.predicted_against_recovered)}; "
        f"against that of the untrained students: {said(ranking.pruned_against_recovered)}. "
        f"Scores: more is better. The winner is {ranking.winner}; to go on with it, in params.yaml: "
        f"`plan: {{method: manual, remove: [{', '.join(ranking.plans[0].removed)}]}}`.",
    ]
    return "\n".join(lines) + "\n"


def _spoken(reference: str) -> str:
    return f"{reference.removesuffix('-pruned')}, untrained" if reference.endswith("-pruned") else reference


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3f} M"


def _digits(measure: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if measure.endswith("accuracy") else f"{value:{sign}.2f}"


def _cell(measure: str, found: Interval, sign: str = "") -> str:
    mean = _digits(measure, found.mean, sign)
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{_digits(measure, found.low, sign)}, {_digits(measure, found.high, sign)}]"


def plot_study(report: StudyReport, target: Path) -> None:
    """Draw every seed, mean and interval of every arm by measure; the teacher as a line, untrained students as crosses.

    An untrained student that all arms share is a line as well.
    """
    measures = list(report.arms[0].means)
    size = (max(9.0, 1.6 * len(report.arms)), 3.3 * math.ceil(len(measures) / 2))
    figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
    axes = figure.subplots(math.ceil(len(measures) / 2), 2, squeeze=False)
    for panel, measure in zip(axes.flat, measures, strict=True):
        _draw(panel, report, measure)
    save_figure(figure, target)


def _draw(panel: Axes, report: StudyReport, measure: str) -> None:
    colour = CONTENT if measure.startswith("content") else MOTION
    for place, arm in enumerate(report.arms):
        seeds = [float(getattr(row.quality, measure)) for row in report.rows if row.arm == arm.arm]
        panel.plot([place + 0.12] * len(seeds), seeds, "o", color=COST, markersize=4)
        found = arm.means[measure]
        half = 0.0 if found.high is None else found.high - found.mean
        panel.errorbar([place - 0.12], [found.mean], [half], fmt="s", color=colour, capsize=4)
        if untrained := report.references.get(f"{arm.arm}-pruned"):
            panel.plot([place], [float(getattr(untrained, measure))], "x", color=INK, markersize=5)
    for name, style in ((TEACHER, "-"), ("pruned", ":")):
        if name in report.references:
            level = float(getattr(report.references[name], measure))
            panel.axhline(level, color=INK, linewidth=0.8, linestyle=style)
            panel.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    better = "more is better" if measure.endswith("accuracy") else "less is better"
    panel.set_title(f"{MEASURES[measure]} ({better})", loc="left", fontsize=10, color=INK)
    crowded = len(report.arms) > 4
    names = [arm.arm for arm in report.arms]
    panel.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    panel.set_xlim(-0.5, len(report.arms) - 0.5)
    plain_axes(panel)
