"""The next best plans against a list of everything."""

import random

import pytest

from tests.tiny import GROWING, new_unet
from vdmini_core.artifacts import CostTable
from vdmini_core.models import IllegalPlan, UNetDenoiser
from vdmini_core.pruning.baselines import legal_removals, parameters_of, removal_sizes
from vdmini_core.pruning.candidates import best_plans, removals_in_order
from vdmini_core.pruning.integer_programme import Expense, Graph, ImpossibleBudget
from vdmini_core.pruning.planning import Damage, Evidence
from vdmini_core.settings import PlanSettings


@pytest.fixture(scope="module")
def teacher() -> UNetDenoiser:
    return new_unet(GROWING)


def expense_of(denoiser: UNetDenoiser) -> Expense:
    parts = {
        part.name: sum(p.numel() for path in part.modules for p in denoiser.model.get_submodule(path).parameters())
        for part in (*denoiser.units, *denoiser.pieces)
    }
    return Expense("parameters", parameters_of(denoiser), parts)


def test_plans_come_in_the_order_of_their_damage_and_none_is_left_out(teacher: UNetDenoiser) -> None:
    draw = random.Random(0)
    damage = {unit.name: draw.random() for unit in teacher.units}
    expense, ratio = expense_of(teacher), 0.62
    found = removals_in_order(Graph.of(teacher), damage, expense, ratio, 6)
    sizes = removal_sizes(teacher, legal_removals(teacher))
    within = [removal for removal, size in sizes.items() if size <= ratio * expense.whole]
    totals = sorted(sum(damage[unit] for unit in removal) for removal in within)
    assert [sum(damage[unit] for unit in removal) for removal in found] == pytest.approx(totals[:6])
    assert len(set(found)) == 6


def test_where_fewer_plans_are_legal_there_are_fewer(teacher: UNetDenoiser) -> None:
    damage, expense = {unit.name: 1.0 for unit in teacher.units}, expense_of(teacher)
    sizes = sorted(removal_sizes(teacher, legal_removals(teacher)).values())
    ratio = sizes[1] / expense.whole
    allowed = sum(size <= sizes[1] for size in sizes)
    assert len(removals_in_order(Graph.of(teacher), damage, expense, ratio, allowed + 3)) == allowed
    with pytest.raises(ImpossibleBudget):
        removals_in_order(Graph.of(teacher), damage, expense, sizes[0] / expense.whole * 0.99, 2)


def test_candidates_need_a_budget_and_scores(teacher: UNetDenoiser) -> None:
    with pytest.raises(ValueError, match=r"set plan\.ratio"):
        best_plans(teacher, PlanSettings(), Evidence())
    with pytest.raises(IllegalPlan, match="needs the sensitivity report"):
        best_plans(teacher, PlanSettings(method="optimal", ratio=0.6), Evidence())


def test_candidates_are_named_by_their_place_and_keep_what_is_protected(teacher: UNetDenoiser) -> None:
    expense = expense_of(teacher)
    damages = {unit.name: Damage(content=0.5, motion=1.0 + place) for place, unit in enumerate(teacher.units)}
    settings = PlanSettings(method="optimal", ratio=0.62, candidates=3, protect=("M",), motion_weight=2.0)

    class Known(Evidence):
        def expense(self, budget: str) -> Expense:
            return expense

    found = best_plans(teacher, settings, Known(CostTable.model_construct(), damages)).plans
    assert [plan.name for plan in found] == ["plan-1", "plan-2", "plan-3"]
    assert all("M" not in plan.removed for plan in found)
    first = found[0]
    expected = sum(damages[unit].content + 2 * damages[unit].motion for unit in first.removed)
    assert first.predicted == pytest.approx(expected)
    assert found[0].predicted <= found[1].predicted <= found[2].predicted

    more = settings.model_copy(update={"random_candidates": 3})
    listed, again = (best_plans(teacher, more, Known(CostTable.model_construct(), damages)).plans for _ in range(2))
    assert listed == again
    assert listed[:3] == found
    drawn = listed[3:]
    assert 0 < len(drawn) <= 3  # one that is among the best is not listed twice
    assert {plan.name for plan in drawn} <= {"random-1", "random-2", "random-3"}
    assert len({plan.removed for plan in listed}) == len(listed)
    for plan in drawn:
        assert "M" not in plan.removed
        assert expense.left(Graph.of(teacher), plan.removed) <= 0.62 * expense.whole
        assert plan.predicted >= found[0].predicted
