"""Bypass and physical removal of units: the same function, or an IllegalPlan with a reason."""

from pathlib import Path

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import EVEN, GROWING, new_inputs, new_unet, output_of
from vdmini_core.models import Condition, IllegalPlan, UNetDenoiser, load_denoiser
from vdmini_core.pruning.planning import paper_layout
from vdmini_core.pruning.surgery import save_model
from vdmini_core.settings import PlanSettings

Inputs = tuple[Tensor, Condition]
NETWORKS = {EVEN: new_unet(EVEN), GROWING: new_unet(GROWING)}
PAPER = paper_layout(NETWORKS[EVEN], PlanSettings())
SMALL = new_inputs(size=8)
UNITS = [unit.name for unit in NETWORKS[EVEN].units]


@pytest.mark.parametrize("widths", [EVEN, GROWING])
def test_keeping_all_units_reproduces_the_teacher_exactly(widths: tuple[int, ...], inputs: Inputs) -> None:
    teacher = NETWORKS[widths]
    expected = output_of(teacher, inputs)
    assert torch.equal(output_of(teacher.without(()), inputs), expected)
    with teacher.bypass(()):
        assert torch.equal(output_of(teacher, inputs), expected)


@pytest.mark.parametrize("widths", [EVEN, GROWING])
def test_the_papers_layout_bypassed_is_the_papers_layout_removed(widths: tuple[int, ...], inputs: Inputs) -> None:
    teacher = NETWORKS[widths]
    student = teacher.without(PAPER)
    with teacher.bypass(PAPER):
        bypassed = output_of(teacher, inputs)
    torch.testing.assert_close(output_of(student, inputs), bypassed, rtol=0, atol=1e-5)
    assert (bypassed - output_of(teacher, inputs)).abs().max() > 0.01


def test_a_student_has_its_own_weights_unless_they_are_to_be_shared(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    own, shared = tiny_unet.without(PAPER), tiny_unet.without(PAPER, shared=True)
    assert torch.equal(output_of(own, inputs), output_of(shared, inputs))
    taken = {parameter.data_ptr() for parameter in tiny_unet.model.parameters()}
    assert {parameter.data_ptr() for parameter in shared.model.parameters()} < taken
    assert not {parameter.data_ptr() for parameter in own.model.parameters()} & taken


def test_a_bypass_ends_with_its_context_even_after_an_error(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    expected = output_of(tiny_unet, inputs)
    with pytest.raises(RuntimeError, match="halfway"), tiny_unet.bypass(["M", "D.3"]):
        raise RuntimeError("halfway")
    assert torch.equal(output_of(tiny_unet, inputs), expected)


@pytest.mark.parametrize("widths", [EVEN, GROWING])
def test_every_unit_and_every_block_can_be_bypassed_alone(widths: tuple[int, ...]) -> None:
    teacher = NETWORKS[widths]
    intact = output_of(teacher, SMALL)
    for name in dict.fromkeys([*teacher.blocks, *UNITS]):
        with teacher.bypass([name]):
            changed = output_of(teacher, SMALL)
        assert changed.isfinite().all()
        assert not torch.equal(changed, intact), name


def check_removal(widths: tuple[int, ...], removed: set[str]) -> bool:
    """Whether the removal is legal; if it is, it equals the bypass."""
    teacher = NETWORKS[widths]
    try:
        student = teacher.without(removed)
    except IllegalPlan:
        return False
    with teacher.bypass(removed):
        bypassed = output_of(teacher, SMALL)
    torch.testing.assert_close(output_of(student, SMALL), bypassed, rtol=0, atol=1e-5)
    assert len(teacher.surviving(removed)) == len(student.units) == len(UNITS) - len(removed)
    return True


# Mostly removals of as many up pairs as down pairs, which may be legal; some that cannot be.
PAIRS = ["", "0 0", "0 1", "0 2", "1 0", "1 1", "1 2", "01 01", "01 02", "01 12", "01 012", "0 12", " 1"]
STAGES = st.lists(st.sampled_from(PAIRS), min_size=4, max_size=4)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([EVEN, GROWING]), STAGES, st.booleans())
def test_any_removal_equals_its_bypass_or_is_an_illegal_plan(
    widths: tuple[int, ...], stages: list[str], mid: bool
) -> None:
    removed = {"M"} if mid else set()
    for stage, pairs in enumerate(stages):
        down, _, up = pairs.partition(" ")
        removed |= {f"D.{stage}.{index}" for index in down} | {f"U.{3 - stage}.{index}" for index in up}
    check_removal(widths, removed)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("widths", [EVEN, GROWING])
def test_every_removal_within_one_stage_equals_its_bypass_or_is_illegal(widths: tuple[int, ...], stage: int) -> None:
    legal = set()
    for down in ("0", "1", "01"):
        for up in ("0", "1", "2", "01", "02", "12"):
            removed = {f"D.{stage}.{i}" for i in down} | {f"U.{3 - stage}.{i}" for i in up}
            if check_removal(widths, removed):
                legal.add((down, up))
    assert ("1", "1") in legal
    assert ("1", "2") not in legal
    assert ("0", "0") not in legal


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_inner_stages_can_go_as_a_whole(stages: int) -> None:
    removed = {"M"}
    for stage in range(4 - stages, 4):
        removed |= {f"D.{stage}.{i}" for i in range(2)} | {f"U.{3 - stage}.{i}" for i in range(3)}
    assert check_removal(EVEN, removed)
    assert NETWORKS[EVEN].without(removed).stages == 4 - stages


def test_a_student_can_be_pruned_again() -> None:
    once = NETWORKS[EVEN].without(PAPER)
    twice = once.without(["D.2", "U.0"])
    with once.bypass(["D.2", "U.0"]):
        bypassed = output_of(once, SMALL)
    torch.testing.assert_close(output_of(twice, SMALL), bypassed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "removed", "reason"),
    [
        (EVEN, ["D.0.1"], r"leaves D\.0 1 pairs and U\.3 3; .*remove pairs of D\.0 and U\.3 together"),
        (EVEN, ["D.3", "U.0"], r"leaves D\.3 0 pairs and U\.0 0"),
        (EVEN, ["D.0.0", "U.3.0"], r"hands pairs of U\.3 other skip.*of U\.3 remove U\.3\.2 or U\.3\.1 instead"),
        (
            GROWING,
            ["D.1.0", "U.2.1"],
            r"changes what D\.1\.1 receives: 32 channels instead of 64; remove a",
        ),
        (GROWING, ["D.1", "U.2.0", "U.2.1"], r"leaves D\.1 no pair, .* 32 -> 64; keep D\.1\.0"),
        (EVEN, ["D.9.9"], r"there is no unit D\.9\.9; the units are D\.0, D\.0\.0"),
        (EVEN, UNITS, r"leaves D\.0 0 pairs and U\.3 0"),
    ],
)
def test_illegal_removals_say_why_and_what_to_do(widths: tuple[int, ...], removed: list[str], reason: str) -> None:
    with pytest.raises(IllegalPlan, match=reason):
        NETWORKS[widths].without(removed)


def test_survivors_map_to_the_students_own_numbering() -> None:
    matches = NETWORKS[EVEN].surviving(PAPER)
    assert matches["D.0.0"] == "D.0.0"
    assert matches["U.1.2"] == "U.0.2"
    assert matches["U.3.2"] == "U.2.1"
    assert not set(PAPER) & set(matches)


def test_inherited_weights_are_copies() -> None:
    teacher = new_unet()
    student = teacher.without(["M"])
    before = output_of(student, SMALL)
    for parameter in teacher.model.parameters():
        parameter.zero_()
    assert torch.equal(output_of(student, SMALL), before)


@pytest.mark.parametrize("removed", [PAPER, ("D.0.1", "U.3.1")])
def test_a_saved_student_reloads_with_every_key_and_the_same_output(tmp_path: Path, removed: tuple[str, ...]) -> None:
    student = NETWORKS[GROWING].without(removed)
    save_model(student, tmp_path / "unet")
    again = load_denoiser(tmp_path / "unet")
    _, info = type(student.model).from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(output_of(again, SMALL), output_of(student, SMALL), rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["unet"]


def test_the_papers_layout_of_svd_xt_has_the_papers_parameter_count() -> None:
    with torch.device("meta"):
        model = UNetSpatioTemporalConditionModel(num_frames=25)
    teacher = UNetDenoiser(model.to("meta"))
    student = teacher.without(paper_layout(teacher, PlanSettings()))
    assert sum(p.numel() for p in teacher.model.parameters()) == 1_524_623_082
    assert sum(p.numel() for p in student.model.parameters()) == 939_884_186
