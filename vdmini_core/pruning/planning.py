"""Chooses which units to remove: the least damage within a budget, the paper's layout, controls, or the user's list."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from vdmini_core.artifacts import Alternative, CostTable, Plan, Predicted, Provenance, SensitivityReport
from vdmini_core.evaluation.costs import count_costs
from vdmini_core.models import Condition, Denoiser, IllegalPlan, UNetDenoiser
from vdmini_core.models.graph import expand
from vdmini_core.models.removal import Rule
from vdmini_core.pruning.integer_programme import Expense, Graph, ImpossibleBudget, front, least_damage, total_of
from vdmini_core.settings import PlanSettings


@dataclass(frozen=True)
class Damage:
    """What removing a unit alone does to the clips' content and motion; 0 is nothing."""

    content: float
    motion: float


@dataclass(frozen=True)
class Evidence:
    """What a plan can be made from besides the graph, as far as it is known: costs, and each unit's damage."""

    costs: CostTable | None = None
    damages: Mapping[str, Damage] | None = None

    def expense(self, budget: str) -> Expense:
        """The kind of cost that a budget is of; IllegalPlan where it is not known."""
        if self.costs is None:
            raise IllegalPlan("a budget needs the teacher's costs; run `vdmini run --target sensitivity`")
        field = "latency_ms" if budget == "latency" else budget
        whole = getattr(self.costs.whole, field)
        if whole is None:
            raise IllegalPlan(
                "plan.budget latency needs latencies, which are measured and not counted: run `vdmini run --target "
                "sensitivity` on the device that will serve, or plan for flops"
            )
        return Expense(budget, whole, {name: getattr(cost, field) for name, cost in self.costs.parts.items()})

    def weighted(self, denoiser: Denoiser, settings: PlanSettings) -> dict[str, float]:
        """Every unit's damage as the settings weigh it; IllegalPlan where a unit was not scored."""
        damages = self.damages or {}
        if missing := [unit.name for unit in denoiser.units if unit.name not in damages]:
            raise IllegalPlan(
                f"there is no score of {', '.join(missing)}; plan.method optimal needs the sensitivity report: run "
                "`vdmini run --target sensitivity`"
            )
        return {
            unit.name: settings.content_weight * damages[unit.name].content
            + settings.motion_weight * damages[unit.name].motion
            for unit in denoiser.units
        }


NOTHING = Evidence()


def evidence_of(report: SensitivityReport) -> Evidence:
    """The costs and damages of a report; a damage below 0 is noise, and counts as none."""
    damages = {s.name: Damage(max(s.content.value, 0.0), max(s.motion.value, 0.0)) for s in report.scores}
    return Evidence(report.costs, damages)


def paper_layout(denoiser: Denoiser, settings: PlanSettings, evidence: Evidence = NOTHING) -> tuple[str, ...]:
    """VDMini's layout (paper, Fig. 2 and Table A4).

    The second R-A pair of every DownBlock and UpBlock goes, except in the stage next to the innermost
    (D.2 and U.1), which stays whole; the innermost blocks (D.3, M, U.0) go altogether.
    """
    if not isinstance(denoiser, UNetDenoiser):
        raise IllegalPlan("plan.method paper is a layout of U-Nets; for a transformer use optimal, uniform or manual")
    innermost = denoiser.stages - 1
    removed = [f"D.{innermost}", "M", "U.0"]
    for stage in range(innermost - 1):
        removed += [f"D.{stage}.1", f"U.{innermost - stage}.1"]
    return expand(removed, denoiser.units)


def manual(denoiser: Denoiser, settings: PlanSettings, evidence: Evidence = NOTHING) -> tuple[str, ...]:
    """Exactly the units and blocks of `plan.remove`."""
    if not settings.remove:
        raise IllegalPlan("plan.method is manual but plan.remove is empty; list units such as [D.0.1, U.3.1]")
    return expand(settings.remove, denoiser.units)


def optimal(denoiser: Denoiser, settings: PlanSettings, evidence: Evidence) -> tuple[str, ...]:
    """The legal removal within the budget whose units' damages add up to the least."""
    return _within_budget(denoiser, settings, evidence, evidence.weighted(denoiser, settings))


def at_random(denoiser: Denoiser, settings: PlanSettings, evidence: Evidence) -> tuple[str, ...]:
    """What `optimal` would remove if the scores were drawn at random: a control of the scores, not of the solver."""
    draw = random.Random(settings.seed)
    return _within_budget(denoiser, settings, evidence, {unit.name: draw.random() for unit in denoiser.units})


def _within_budget(
    denoiser: Denoiser, settings: PlanSettings, evidence: Evidence, damage: Mapping[str, float]
) -> tuple[str, ...]:
    ratio = _ratio(settings)
    return least_damage(_graph(denoiser, settings), damage, evidence.expense(settings.budget), ratio)


def _graph(denoiser: Denoiser, settings: PlanSettings) -> Graph:
    return Graph.of(denoiser).keeping(expand(settings.protect, denoiser.units))


def _ratio(settings: PlanSettings) -> float:
    if settings.ratio is None:
        raise IllegalPlan(f"plan.method {settings.method} needs a budget here; set plan.ratio, such as 0.6")
    return settings.ratio


def uniform(denoiser: Denoiser, settings: PlanSettings, evidence: Evidence = NOTHING) -> tuple[str, ...]:
    """Evenly over depth: of a U-Net's stages no larger a share than the budget asks for, of blocks every n-th.

    A transformer loses as many blocks as the budget asks for, or `fraction` of each of its lists where there is
    none; the outermost of a list stay.
    """
    if isinstance(denoiser, UNetDenoiser):
        return _same_share_of_every_stage(denoiser, settings, evidence)
    if settings.ratio is None:
        removed = _every_nth(denoiser, settings, settings.fraction)
        if not removed:
            raise IllegalPlan(f"plan.fraction {settings.fraction} of {len(denoiser.units)} blocks is none; raise it")
        return removed
    graph, expense, blocks = _graph(denoiser, settings), evidence.expense(settings.budget), len(denoiser.units)
    for count in range(blocks + 1):
        removed = _every_nth(denoiser, settings, count / blocks)
        if expense.left(graph, removed) <= settings.ratio * expense.whole:
            return removed
    raise ImpossibleBudget(settings.ratio, expense.what, expense.left(graph, removed) / expense.whole)


def _every_nth(denoiser: Denoiser, settings: PlanSettings, fraction: float) -> tuple[str, ...]:
    removed, protected = [], expand(settings.protect, denoiser.units)
    for _, group in itertools.groupby(denoiser.units, key=lambda unit: unit.name.split(".")[0]):
        names = [unit.name for unit in group]
        inner = [name for name in names[1:-1] if name not in protected]
        count = min(round(fraction * len(names)), len(inner))
        removed += [inner[int((index + 0.5) * len(inner) / count)] for index in range(count)]
    return expand(removed, denoiser.units)


def _same_share_of_every_stage(denoiser: UNetDenoiser, settings: PlanSettings, evidence: Evidence) -> tuple[str, ...]:
    """The fewest units, where none of the stages loses a larger share of its units than it has to."""
    graph, expense, ratio = _graph(denoiser, settings), evidence.expense(settings.budget), _ratio(settings)
    stages: list[list[str]] = [[] for _ in range(denoiser.stages)]
    for unit in denoiser.units:
        stages[min(unit.depth, denoiser.stages - 1)].append(unit.name)  # the mid block counts as innermost
    shares = sorted({removed / len(names) for names in stages for removed in range(len(names) + 1)})

    def with_at_most(share: float) -> Iterator[Rule]:
        for names in stages:
            least = math.ceil(len(names) * (1 - share) - 1e-9)
            yield Rule(dict.fromkeys(names, 1), least, len(names), lambda removed: "takes more than an even share")

    for share in shares:
        try:
            return least_damage(graph.under(with_at_most(share)), dict.fromkeys(graph.units, 1.0), expense, ratio)
        except ImpossibleBudget as error:
            impossible = error
    raise impossible


METHODS: dict[str, Callable[[Denoiser, PlanSettings, Evidence], tuple[str, ...]]] = {
    "paper": paper_layout,
    "optimal": optimal,
    "uniform": uniform,
    "random": at_random,
    "manual": manual,
}


def choose(denoiser: Denoiser, settings: PlanSettings, evidence: Evidence = NOTHING) -> tuple[str, ...]:
    """The units that the method removes, in graph order; IllegalPlan where they cannot be, or too little is known."""
    removed = METHODS[settings.method](denoiser, settings, evidence)
    if against := [name for name in expand(settings.protect, denoiser.units) if name in removed]:
        raise IllegalPlan(
            f"plan.method {settings.method} removes {', '.join(against)}, which plan.protect lists; change one of them"
        )
    denoiser.check(removed)
    return removed


def predict(denoiser: Denoiser, settings: PlanSettings, evidence: Evidence, removed: tuple[str, ...]) -> Predicted:
    """What the costs and damages of the units say about a removal; the costs have to be known."""

    def share(budget: str) -> float:
        expense = evidence.expense(budget)
        return expense.left(Graph.of(denoiser), removed) / expense.whole

    timed = evidence.costs is not None and evidence.costs.whole.latency_ms is not None
    costs = share("parameters"), share("flops"), share("latency") if timed else None
    if evidence.damages is None:
        return Predicted(parameters=costs[0], flops=costs[1], latency=costs[2])
    gone = [evidence.damages[name] for name in removed]
    return Predicted(
        parameters=costs[0],
        flops=costs[1],
        latency=costs[2],
        content=math.fsum(damage.content for damage in gone),
        motion=math.fsum(damage.motion for damage in gone),
        damage=total_of(evidence.weighted(denoiser, settings), removed),
    )


def make_plan(
    denoiser: Denoiser,
    settings: PlanSettings,
    latents: Tensor,
    condition: Condition,
    evidence: Evidence = NOTHING,
    *,
    report_digest: str,
    teacher_digest: str,
    provenance: Provenance,
) -> Plan:
    """Choose the removal, build the student once (on the meta device) to know that it is legal and what it saves.

    Raises IllegalPlan naming the units and what to remove instead, or the nearest possible budget.
    """
    twin = denoiser.on_meta()
    before = count_costs(twin, latents, condition)
    evidence = Evidence(evidence.costs or before.table(), evidence.damages)
    removed = choose(twin, settings, evidence)
    after = count_costs(twin.without(removed), latents, condition)

    def alternative(names: tuple[str, ...]) -> Alternative:
        return Alternative(removed=names, predicted=predict(twin, settings, evidence, names))

    predicted = predict(twin, settings, evidence, removed)
    points: list[tuple[str, ...]] = []
    if evidence.damages is not None:
        damage, expense = evidence.weighted(twin, settings), evidence.expense(settings.budget)
        points = [names for _, names in front(_graph(twin, settings), damage, expense)]
    return Plan(
        method=settings.method,
        removed=removed,
        kept=tuple(unit.name for unit in denoiser.units if unit.name not in removed),
        teacher_parameters=before.parameters,
        student_parameters=after.parameters,
        teacher_flops=before.flops,
        student_flops=after.flops,
        budget=settings.budget,
        ratio=settings.ratio,
        predicted=predicted,
        front=tuple(map(alternative, points)),
        named={name: alternative(names) for name, names in _others(twin, settings, evidence, predicted)},
        report_digest=report_digest,
        teacher_digest=teacher_digest,
        provenance=provenance,
    )


def _others(
    denoiser: Denoiser, settings: PlanSettings, evidence: Evidence, predicted: Predicted
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the other methods remove within the same budget, or what the plan leaves where it has none."""
    ratio = settings.ratio or getattr(predicted, settings.budget)
    for method in METHODS:
        if method not in ("manual", settings.method):
            asked = settings.model_copy(update={"method": method, "ratio": ratio})
            try:
                yield method, choose(denoiser, asked, evidence)
            except IllegalPlan:  # not for this kind of network, these protected units, or this budget
                continue


def describe_plan(plan: Plan) -> str:
    """The plan as a few lines of markdown."""
    fewer = 1 - plan.student_parameters / plan.teacher_parameters
    lines = [
        f"Plan `{plan.method}`: {plan.teacher_parameters:,} -> {plan.student_parameters:,} parameters "
        f"({fewer:.1%} fewer), {plan.student_flops / plan.teacher_flops:.3f} of the FLOPs",
        "",
        f"- removed: {', '.join(plan.removed) or 'nothing'}",
        f"- kept: {', '.join(plan.kept)}",
    ]
    rows = {f"**{plan.method}**": plan.predicted} if plan.predicted else {}
    rows |= {name: other.predicted for name, other in plan.named.items()}
    if rows:
        budget = "" if plan.ratio is None else f", within {plan.ratio:g} of the {plan.budget}"
        lines += ["", f"Predicted, as shares of the teacher's, and damages as sums of the units' own{budget}:", ""]
        lines += ["| method | parameters | FLOPs | latency | content | motion | weighted damage |", "|---" * 7 + "|"]
        lines += [f"| {name} | {' | '.join(_cells(row))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def _cells(row: Predicted) -> list[str]:
    shares = [row.parameters, row.flops, row.latency]
    damages = [row.content, row.motion, row.damage]
    return ["-" if x is None else f"{x:.3f}" for x in shares] + ["-" if x is None else f"{x:.4g}" for x in damages]
