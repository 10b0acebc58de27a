"""Plans: the least damage within a budget, the paper's layout, controls, the user's list, and what a removal saves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.models.rule_oracle import legal_rows
from tests.models.tiny_transformers import new_condition, new_latents, new_transformer
from tests.tiny import GROWING, PROVENANCE, new_inputs, new_unet
from vdmini_core.artifacts import Cost, CostTable, Plan
from vdmini_core.evaluation.costs import PartLatencies, count_costs
from vdmini_core.evaluation.plan_plot import plan_figure, plot_plan
from vdmini_core.models import Condition, Denoiser, IllegalPlan, UNetDenoiser
from vdmini_core.models.published import published
from vdmini_core.pruning.integer_programme import ImpossibleBudget
from vdmini_core.pruning.planning import (
    METHODS,
    NOTHING,
    Damage,
    Evidence,
    choose,
    describe_plan,
    make_plan,
    manual,
    paper_layout,
    predict,
)
from vdmini_core.settings import PlanSettings

Inputs = tuple[Tensor, Condition]
UNET = new_unet(GROWING)


def plan_of(denoiser: UNetDenoiser, inputs: Inputs, evidence: Evidence = NOTHING, **settings: object) -> Plan:
    chosen = PlanSettings(**settings)
    return make_plan(denoiser, chosen, *inputs, evidence, report_digest="r", teacher_digest="t", provenance=PROVENANCE)


def evidence_for(denoiser: Denoiser, inputs: Inputs, damages: dict[str, Damage] | None = None) -> Evidence:
    """Counted costs, a millisecond for each part of 25 in all, and damages: 1 for content, 2 for motion."""
    counted = count_costs(denoiser, *inputs)
    parts = [*counted.unit_parameters, *counted.piece_parameters]
    every = {unit.name: Damage(1.0, 2.0) for unit in denoiser.units}
    return Evidence(counted.table(PartLatencies(25.0, dict.fromkeys(parts, 1.0))), every | (damages or {}))


@pytest.fixture(scope="module")
def known() -> Evidence:
    """Of `UNET`: D.0.1 and U.3.1 do nothing to content, D.3 and U.0 nothing to motion."""
    outer = dict.fromkeys(["D.0.1", "U.3.1"], Damage(0.0, 5.0))
    inner = dict.fromkeys(["D.3.0", "D.3.1", "U.0.0", "U.0.1", "U.0.2"], Damage(5.0, 0.0))
    return evidence_for(UNET, new_inputs(size=8), outer | inner)


def test_the_papers_layout_is_the_papers(tiny_unet: UNetDenoiser) -> None:
    # Fig. 2 and Table A4: D.2 and U.1 stay whole, the innermost blocks go, elsewhere the second pair.
    assert paper_layout(tiny_unet, PlanSettings()) == (
        "D.0.1",
        "D.1.1",
        "D.3.0",
        "D.3.1",
        "M",
        "U.0.0",
        "U.0.1",
        "U.0.2",
        "U.2.1",
        "U.3.1",
    )


def test_a_manual_plan_takes_units_and_blocks_in_graph_order(tiny_unet: UNetDenoiser) -> None:
    removed = manual(tiny_unet, PlanSettings(method="manual", remove=("U.0", "M", "D.3")))
    assert removed == ("D.3.0", "D.3.1", "M", "U.0.0", "U.0.1", "U.0.2")


def test_an_empty_manual_plan_is_refused(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    with pytest.raises(IllegalPlan, match=r"plan\.remove is empty; list units such as"):
        plan_of(tiny_unet, inputs, method="manual")


def test_an_unknown_unit_is_refused_with_the_known_ones(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    with pytest.raises(IllegalPlan, match=r"there is no unit X\.1; the units are D\.0, D\.0\.0"):
        plan_of(tiny_unet, inputs, method="manual", remove=("X.1",))


def test_an_illegal_manual_plan_is_refused_when_it_is_made(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    with pytest.raises(IllegalPlan, match=r"remove pairs of D\.0 and U\.3 together"):
        plan_of(tiny_unet, inputs, method="manual", remove=("D.0.1",))


def test_every_method_of_the_settings_is_listed() -> None:
    assert set(METHODS) == set(PlanSettings.model_fields["method"].annotation.__args__)


def test_a_plan_accounts_for_every_unit_and_counts_what_it_saves(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    plan = plan_of(tiny_unet, inputs, method="paper")
    student = tiny_unet.without(plan.removed)
    assert sorted(plan.removed + plan.kept) == sorted(unit.name for unit in tiny_unet.units)
    assert plan.teacher_parameters == sum(p.numel() for p in tiny_unet.model.parameters())
    assert plan.student_parameters == sum(p.numel() for p in student.model.parameters())
    assert plan.student_flops == count_costs(student, *inputs).flops < plan.teacher_flops
    assert (plan.report_digest, plan.teacher_digest) == ("r", "t")


def test_the_description_names_the_units_and_the_saving(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    plan = plan_of(tiny_unet, inputs, method="manual", remove=("M",))
    text = describe_plan(plan)
    assert f"{plan.teacher_parameters:,} -> {plan.student_parameters:,} parameters" in text
    assert "- removed: M\n" in text


def test_making_a_plan_leaves_the_teacher_as_it_was(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    before = {name: value.clone() for name, value in tiny_unet.model.state_dict().items()}
    plan_of(tiny_unet, inputs, method="paper")
    assert all(torch.equal(value, before[name]) for name, value in tiny_unet.model.state_dict().items())


def ask(known: Evidence, denoiser: Denoiser = UNET, **settings: object) -> tuple[str, ...]:
    return choose(denoiser, PlanSettings(**settings), known)


def left(known: Evidence, removed: tuple[str, ...], budget: str = "parameters") -> float:
    return float(getattr(predict(UNET, PlanSettings(), known, removed), budget))


def test_the_weights_decide_whether_content_or_motion_is_spared(known: Evidence) -> None:
    content = ask(known, method="optimal", ratio=0.8, motion_weight=0, budget="latency")
    motion = ask(known, method="optimal", ratio=0.8, content_weight=0, budget="latency")
    assert {"D.0.1", "U.3.1"} <= set(content) - set(motion)
    assert {"D.3.0", "D.3.1"} & (set(motion) - set(content))


@pytest.mark.parametrize("budget", ["parameters", "flops", "latency"])
@pytest.mark.parametrize("method", ["optimal", "uniform", "random"])
def test_every_kind_of_budget_is_met_by_every_method_that_has_one(known: Evidence, method: str, budget: str) -> None:
    removed = ask(known, method=method, budget=budget, ratio=0.75)
    assert removed
    assert left(known, removed, budget) <= 0.75
    UNET.check(removed)


def test_random_plans_differ_by_seed_and_repeat(known: Evidence) -> None:
    drawn = [ask(known, method="random", ratio=0.7, seed=seed) for seed in (0, 1, 2, 0)]
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) > 1


def test_uniform_takes_as_even_a_share_of_a_unets_stages_as_it_can(known: Evidence) -> None:
    names = [unit.name for unit in UNET.units]
    stages = np.array([[min(unit.depth, 3) == stage for unit in UNET.units] for stage in range(4)], dtype=float)
    stages /= stages.sum(1, keepdims=True)

    def largest_share(gone: np.ndarray) -> np.ndarray:
        return (gone @ stages.T).max(-1)

    every = 1 - legal_rows(names, UNET.rules)
    for ratio in (0.85, 0.6):
        removed = ask(known, method="uniform", ratio=ratio)
        share = largest_share(np.array([name in removed for name in names], dtype=float))
        more_even = every[largest_share(every) < share - 1e-9]
        assert len(more_even) > 1
        left_by = [left(known, tuple(n for n, gone in zip(names, row, strict=True) if gone)) for row in more_even]
        assert min(left_by) > ratio >= left(known, removed)
    with pytest.raises(IllegalPlan, match=r"plan\.method uniform needs a budget here; set plan\.ratio"):
        ask(known, method="uniform")


def test_uniform_removes_as_few_blocks_of_a_transformer_as_the_budget_asks_for() -> None:
    teacher = published("hunyuan-video")
    sizes = {unit.name: Cost(parameters=1, flops=1, latency_ms=None) for unit in teacher.units}
    known = Evidence(CostTable(whole=Cost(parameters=60, flops=60, latency_ms=None), parts=sizes))
    removed = ask(known, teacher, method="uniform", ratio=0.8)
    assert len(removed) == 12
    assert removed == ask(known, teacher, method="uniform", fraction=0.2)
    without = ask(known, teacher, method="uniform", ratio=0.8, protect=removed[:2])
    assert len(without) == 12
    assert not set(removed[:2]) & set(without)
    with pytest.raises(ImpossibleBudget, match=r"possible budget is 0\.0667"):
        ask(known, teacher, method="uniform", ratio=0.05)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "paper", "protect": ("D.3", "U.1")}, r"paper removes D\.3\.0, D\.3\.1, which plan\.protect lists"),
        ({"method": "optimal", "ratio": 0.01}, r"leaves 0\.01 of the teacher's parameters .* budget is 0\.\d{4}"),
        ({"method": "optimal", "ratio": 0.5, "protect": ("X.1",)}, r"there is no unit X\.1; the units are"),
    ],
)
def test_what_cannot_be_planned_is_refused(known: Evidence, settings: dict[str, object], told: str) -> None:
    with pytest.raises(IllegalPlan, match=told):
        ask(known, **settings)


def test_what_is_not_known_is_asked_for(known: Evidence) -> None:
    with pytest.raises(IllegalPlan, match=r"no score of D\.0\.0, .*run `vdmini run --target sensitivity`"):
        ask(replace(known, damages=None), method="optimal", ratio=0.5)
    with pytest.raises(IllegalPlan, match="a budget needs the teacher's costs"):
        ask(NOTHING, method="random", ratio=0.5)
    counted = Evidence(count_costs(UNET, *new_inputs(size=8)).table())
    with pytest.raises(IllegalPlan, match=r"plan\.budget latency needs latencies"):
        ask(counted, method="random", ratio=0.5, budget="latency")
    with pytest.raises(ValidationError, match="method optimal needs a budget"):
        PlanSettings(method="optimal")


def test_a_plan_predicts_exactly_what_it_counts_and_shows_front_and_controls(known: Evidence) -> None:
    plan = plan_of(UNET, new_inputs(size=8), known, method="optimal", ratio=0.7, protect=("D.0.1",))
    assert plan.predicted is not None
    assert plan.student_parameters / plan.teacher_parameters == plan.predicted.parameters <= 0.7
    assert plan.student_flops / plan.teacher_flops == plan.predicted.flops
    assert plan.predicted.damage == plan.predicted.content + plan.predicted.motion
    assert "D.0.1" in plan.kept
    budgets = [point.predicted.parameters for point in plan.front]
    damages = [point.predicted.damage for point in plan.front]
    assert budgets == sorted(budgets)
    assert damages == sorted(damages, reverse=True)
    assert (budgets[-1], damages[-1]) == (1.0, 0.0)
    assert set(plan.named) == {"uniform", "random"}  # the paper's layout removes what is protected
    best = [other.predicted.damage for other in plan.named.values() if other.predicted.parameters <= 0.7]
    assert plan.predicted.damage <= min(best)


def test_the_papers_layout_is_set_against_the_optimum_of_its_own_size(known: Evidence) -> None:
    plan = plan_of(UNET, new_inputs(size=8), known, method="paper")
    assert set(plan.named) == {"optimal", "uniform", "random"}
    assert plan.predicted is not None
    best = plan.named["optimal"].predicted
    assert best.parameters <= plan.predicted.parameters
    assert best.damage <= plan.predicted.damage
    assert "| optimal |" in describe_plan(plan)
    assert "| **paper** |" in describe_plan(plan)


def test_the_figure_marks_what_goes_in_a_unet_and_in_a_transformer(known: Evidence, tmp_path: Path) -> None:
    plan = plan_of(UNET, new_inputs(size=8), known, method="optimal", ratio=0.7)
    figure = plan_figure(plan, UNET.units, (), known.costs.parts)
    drawing, *_, pareto = figure.axes
    crosses = [text for text in drawing.texts if text.get_text() == "×"]
    assert len(crosses) == len(plan.removed)
    assert len(pareto.lines[0].get_xdata()) == len(plan.front)
    assert "least predicted damage" in pareto.get_title(loc="left").lower()
    plot_plan(plan, UNET.units, (), known.costs.parts, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    teacher, inputs = new_transformer("HunyuanVideoTransformer3DModel"), (new_latents(), new_condition())
    known = evidence_for(teacher, inputs)
    plan = plan_of(teacher, inputs, replace(known, damages=None), method="manual", remove=("single.1",))
    drawing = plan_figure(plan, teacher.units, (), known.costs.parts).axes[0]
    assert {"double", "single", "×"} == {text.get_text() for text in drawing.texts}
