"""Plans: the paper's layout, what the user lists, and what a removal saves."""

import pytest
import torch
from torch import Tensor

from tests.tiny import PROVENANCE
from vdmini_core.artifacts import Plan
from vdmini_core.evaluation.costs import count_costs
from vdmini_core.models import Condition, IllegalPlan, UNetDenoiser
from vdmini_core.pruning.planning import METHODS, describe_plan, make_plan, manual, paper_layout
from vdmini_core.settings import PlanSettings

Inputs = tuple[Tensor, Condition]


def plan_of(denoiser: UNetDenoiser, inputs: Inputs, **settings: object) -> Plan:
    chosen = PlanSettings(**settings)
    return make_plan(denoiser, chosen, *inputs, report_digest="r", teacher_digest="t", provenance=PROVENANCE)


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
