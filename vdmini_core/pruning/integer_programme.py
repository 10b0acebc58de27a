"""Which units to keep so that damage is least within a budget: an integer programme, solved exactly (HiGHS).

A variable per unit and per piece is 1 where it is kept; the graph's rules are linear in the units', and a piece
stays while any of its units does. Costs and damages add up: of units and pieces that go, in whatever company.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from vdmini_core.models import Denoiser, IllegalPlan
from vdmini_core.models.removal import Piece, Rule, kept

TOLERANCE = 1e-9
"""Share of the whole by which a cost may be above its limit: no more than rounding."""
SCALE = 1e4
"""Sums that the solver sees are of this size, since its own tolerances, about 1e-6, are absolute."""


class ImpossibleBudget(IllegalPlan):
    """No legal removal is within the budget; `nearest` is the least share that one leaves."""

    def __init__(self, ratio: float, what: str, nearest: float) -> None:
        self.nearest = nearest
        upwards = math.ceil(nearest * 1e4 - TOLERANCE) / 1e4
        super().__init__(
            f"no legal removal leaves {ratio:g} of the teacher's {what} or less; the nearest possible budget is "
            f"{upwards:.4f}"
        )


@dataclass(frozen=True)
class Graph:
    """What there is to choose from: the units in graph order, the rules of their removal, what else goes with them."""

    units: tuple[str, ...]
    rules: tuple[Rule, ...]
    pieces: tuple[Piece, ...] = ()

    @classmethod
    def of(cls, denoiser: Denoiser) -> "Graph":
        """That of a denoiser."""
        return cls(tuple(unit.name for unit in denoiser.units), denoiser.rules, denoiser.pieces)

    def under(self, rules: Iterable[Rule]) -> "Graph":
        """The same with more rules."""
        return replace(self, rules=(*self.rules, *rules))

    def keeping(self, names: Collection[str]) -> "Graph":
        """The same where these units stay."""
        return self.under(kept(names, "which plan.protect lists"))

    def gone(self, removed: Collection[str]) -> list[str]:
        """Units and pieces that go when `removed` do."""
        return [*removed, *(piece.name for piece in self.pieces if set(piece.units) <= set(removed))]


@dataclass(frozen=True)
class Expense:
    """What one kind of cost is for the whole teacher, and for each unit and piece by name."""

    what: str
    whole: float
    parts: Mapping[str, float]

    def left(self, graph: Graph, removed: Collection[str]) -> float:
        """The student's cost."""
        return self.whole - math.fsum(self.parts[name] for name in graph.gone(removed))


def least_damage(graph: Graph, damage: Mapping[str, float], expense: Expense, ratio: float) -> tuple[str, ...]:
    """The legal removal of least total damage that leaves at most `ratio` of the cost, in graph order.

    Of several the one that leaves most. `damage` is each unit's, none below 0. Raises ImpossibleBudget.
    """
    programme = _Programme(graph)
    within = programme.costs(expense), ratio * expense.whole * (1 + TOLERANCE)
    best = programme.solve({unit: damage[unit] for unit in graph.units}, [within])
    while best is not None and expense.left(graph, best) > within[1]:  # above the limit by the solver's tolerance
        programme.exclude(best)
        best = programme.solve({unit: damage[unit] for unit in graph.units}, [within])
    if best is None:
        raise ImpossibleBudget(ratio, expense.what, expense.left(graph, smallest(graph, expense)) / expense.whole)
    total, spared = total_of(damage, best), {unit: -damage[unit] for unit in graph.units}
    slack = TOLERANCE * math.fsum(damage.values())
    no_worse = spared, total + slack + math.fsum(spared.values())
    fuller = programme.solve(expense.parts, [within, no_worse])
    if fuller is not None and total_of(damage, fuller) <= total + slack and expense.left(graph, fuller) <= within[1]:
        return fuller
    return best


def smallest(graph: Graph, expense: Expense) -> tuple[str, ...]:
    """The legal removal that leaves least of the cost."""
    found = _Programme(graph).solve({name: -cost for name, cost in expense.parts.items()}, [])
    if found is None:
        raise RuntimeError("the rules of the graph forbid every removal, even none")
    return found


def front(
    graph: Graph, damage: Mapping[str, float], expense: Expense, points: int = 25
) -> list[tuple[float, tuple[str, ...]]]:
    """Share of the cost that is left -> removal, ascending; none has both less cost and less damage than another.

    Of the solutions for `points` budgets, from the least possible one to everything.
    """
    least = expense.left(graph, smallest(graph, expense)) / expense.whole
    found: list[tuple[float, tuple[str, ...]]] = []
    for ratio in np.linspace(least, 1, points):
        removed = least_damage(graph, damage, expense, float(ratio))
        if not found or total_of(damage, removed) < total_of(damage, found[-1][1]):
            found.append((expense.left(graph, removed) / expense.whole, removed))
    return found


def total_of(damage: Mapping[str, float], removed: Iterable[str]) -> float:
    """The damages of the removed units, added up."""
    return math.fsum(damage[unit] for unit in removed)


class _Programme:
    """The rules as rows of a matrix: a column a unit, then one a piece."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names = [*graph.units, *(piece.name for piece in graph.pieces)]
        self.rows: list[np.ndarray[Any, Any]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        for rule in graph.rules:
            self._add(rule.terms, rule.low, rule.high)
        for piece in graph.pieces:
            for unit in piece.units:  # as long as a unit is there, the piece is
                self._add({piece.name: 1, unit: -1}, 0, np.inf)
            self._add({piece.name: -1} | dict.fromkeys(piece.units, 1), 0, np.inf)

    def _row(self, terms: Mapping[str, float]) -> np.ndarray[Any, Any]:
        return np.array([terms.get(name, 0) for name in self.names], dtype=float)

    def _add(self, terms: Mapping[str, float], low: float, high: float) -> None:
        self.rows.append(self._row(terms))
        self.low.append(low)
        self.high.append(high)

    def costs(self, expense: Expense) -> dict[str, float]:
        """Terms of the student's cost; "" is what stays whatever goes."""
        return {**expense.parts, "": expense.whole - math.fsum(expense.parts[name] for name in self.names)}

    def exclude(self, removed: Collection[str]) -> None:
        """Allow anything but this removal."""
        signs = {unit: -1 if unit in removed else 1 for unit in self.graph.units}
        self._add(signs, -np.inf, len(self.graph.units) - len(removed) - 1)

    def solve(
        self, worth: Mapping[str, float], limits: Iterable[tuple[Mapping[str, float], float]]
    ) -> tuple[str, ...] | None:
        """The removal that keeps the most worth, each sum of kept terms within its limit; None where there is none."""
        rows, high = list(self.rows), list(self.high)
        for terms, limit in limits:
            row, allowed = self._row(terms), limit - terms.get("", 0.0)
            scale = SCALE / max(np.abs(row).sum(), abs(allowed), 1e-300)
            rows.append(row * scale)
            high.append(allowed * scale)
        low = self.low + [-np.inf] * (len(rows) - len(self.low))
        objective = -self._row(worth)
        found = milp(
            objective * (SCALE / max(np.abs(objective).sum(), 1e-300)),
            constraints=LinearConstraint(np.array(rows), low, high),
            integrality=np.ones(len(self.names)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        if found.status == 2:
            return None
        if found.status != 0:
            raise RuntimeError(f"the solver (HiGHS) gave up: {found.message}")
        removed = tuple(unit for unit, stays in zip(self.graph.units, found.x, strict=False) if stays < 0.5)
        for rule in self.graph.rules:
            if not rule.holds(removed):
                raise RuntimeError(f"the solver (HiGHS) broke a rule: removing {removed} {rule.broken(removed)}")
        return removed
