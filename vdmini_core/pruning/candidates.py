"""The plans that come next after the best: what a probe tries before anyone trains for long."""

import random
from collections.abc import Mapping

from vdmini_core.evaluation.study import Candidate, Candidates
from vdmini_core.models import Denoiser
from vdmini_core.models.graph import expand
from vdmini_core.models.removal import Rule
from vdmini_core.pruning.integer_programme import Expense, Graph, ImpossibleBudget, least_damage, total_of
from vdmini_core.pruning.planning import Evidence
from vdmini_core.settings import PlanSettings


def best_plans(denoiser: Denoiser, settings: PlanSettings, evidence: Evidence) -> Candidates:
    """The `plan.candidates` removals of least predicted damage within the budget, the best first, then random ones.

    Of `plan.random_candidates` each has least damage where every unit's is drawn at random, by its place as the seed.
    Fewer where fewer are legal. IllegalPlan where the budget is impossible or too little is known; ValueError without
    a budget.
    """
    if settings.ratio is None:
        raise ValueError("plans are compared within one budget; set plan.ratio, such as 0.6")
    damage, expense = evidence.weighted(denoiser, settings), evidence.expense(settings.budget)
    graph = Graph.of(denoiser).keeping(expand(settings.protect, denoiser.units))
    found = removals_in_order(graph, damage, expense, settings.ratio, settings.candidates)
    names = {removed: f"plan-{place}" for place, removed in enumerate(found, 1)}
    for seed in range(settings.random_candidates):
        draw = random.Random(seed)
        drawn = least_damage(graph, {unit: draw.random() for unit in graph.units}, expense, settings.ratio)
        names.setdefault(drawn, f"random-{seed + 1}")
    return Candidates(
        plans=tuple(
            Candidate(name=name, removed=removed, predicted=total_of(damage, removed))
            for removed, name in names.items()
        )
    )


def removals_in_order(
    graph: Graph, damage: Mapping[str, float], expense: Expense, ratio: float, count: int
) -> list[tuple[str, ...]]:
    """The first `count` legal removals within the budget by total damage, exactly; each is forbidden to the next."""
    found: list[tuple[str, ...]] = []
    while len(found) < count:
        try:
            found.append(least_damage(graph, damage, expense, ratio))
        except ImpossibleBudget:
            if not found:
                raise
            break
        graph = graph.under([_another_than(found[-1], graph)])
    return found


def _another_than(removed: tuple[str, ...], graph: Graph) -> Rule:
    """That at least one of the removed units stays, or one of the others goes."""
    signs = {unit: -1 if unit in removed else 1 for unit in graph.units}
    others = len(graph.units) - len(removed)
    return Rule(signs, -len(removed), others - 1, lambda now: "is a plan that was found before")
