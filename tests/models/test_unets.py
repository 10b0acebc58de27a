"""The contract of a U-Net, whatever its class: bypassed, removed, saved and reloaded it is the same function."""

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet3DConditionModel, UNetMotionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import fresh
from tests.models.tiny_unets import CLASSES, MOTION, SVD, TEXT_3D, answer_of, inputs_of, new_unet_of
from tests.tiny import EVEN, GROWING, new_unet, output_of
from vdmini_core.models import IllegalPlan, UNetDenoiser, load_denoiser
from vdmini_core.models.unet import STUDENTS
from vdmini_core.models.videocrafter import UNetArguments, _diffusers_config
from vdmini_core.pruning.planning import paper_layout
from vdmini_core.pruning.surgery import save_model
from vdmini_core.settings import PlanSettings

teacher_of = cache(new_unet_of)
PAPER = paper_layout(teacher_of(SVD), PlanSettings())
SECOND_PAIRS = ("D.0.1", "D.1.1", "D.2.1", "D.3.1", "U.0.1", "U.1.1", "U.2.1", "U.3.1")
INNERMOST = ("D.3", "M", "U.0")
every_class = pytest.mark.parametrize("name", CLASSES)
# Cases marked so are in test_removal.py for SVD.
every_text_class = pytest.mark.parametrize("name", [TEXT_3D, MOTION])
all_widths = pytest.mark.parametrize("widths", [EVEN, GROWING])


def names_of(denoiser: UNetDenoiser) -> list[str]:
    return [unit.name for unit in denoiser.units]


def parameters_of(denoiser: UNetDenoiser) -> int:
    return sum(parameter.numel() for parameter in denoiser.model.parameters())


def bypassed_answer(denoiser: UNetDenoiser, names: tuple[str, ...]) -> Tensor:
    with denoiser.bypass(names):
        return answer_of(denoiser)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def check_removal(teacher: UNetDenoiser, removed: set[str]) -> bool:
    """Whether the removal is legal; if it is, it equals the bypass."""
    try:
        student = teacher.without(removed)
    except IllegalPlan:
        return False
    assert_same(answer_of(student), bypassed_answer(teacher, tuple(removed)))
    return True


@every_class
@pytest.mark.parametrize("removed", [PAPER, ("D.0.0", "M", "U.3.1")])
def test_survivors_have_the_weights_of_the_units_they_are_said_to_be(name: str, removed: tuple[str, ...]) -> None:
    teacher = teacher_of(name)
    student = teacher.without(removed)
    matches, modules = teacher.surviving(removed), teacher.surviving_modules(removed)
    assert list(matches.values()) == names_of(student)
    units = {unit.name: unit for unit in teacher.units}, {unit.name: unit for unit in student.units}
    for old, new in matches.items():
        paths = units[0][old].modules, units[1][new].modules
        assert [modules[path] for path in paths[0]] == list(paths[1])
    ours, theirs = teacher.model.state_dict(), student.model.state_dict()
    found = {}
    for name, tensor in ours.items():
        path, _, last = name.rpartition(".")
        if path in modules:
            found[f"{modules[path]}.{last}"] = tensor
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)
    assert not {tensor.data_ptr() for tensor in ours.values()} & {tensor.data_ptr() for tensor in theirs.values()}


@every_text_class
def test_keeping_all_units_reproduces_the_teacher_exactly(name: str) -> None:
    teacher = teacher_of(name, GROWING)
    expected = answer_of(teacher)
    assert torch.equal(answer_of(teacher.without(())), expected)
    assert torch.equal(bypassed_answer(teacher, ()), expected)


@every_text_class
@all_widths
def test_the_papers_layout_bypassed_is_the_papers_layout_removed(name: str, widths: tuple[int, ...]) -> None:
    teacher = teacher_of(name, widths)
    assert paper_layout(teacher, PlanSettings()) == PAPER
    assert check_removal(teacher, set(PAPER))
    assert (bypassed_answer(teacher, PAPER) - answer_of(teacher)).abs().max() > 0.01


@every_text_class
@all_widths
def test_every_unit_and_every_block_matters(name: str, widths: tuple[int, ...]) -> None:
    teacher = teacher_of(name, widths)
    intact = answer_of(teacher)
    for chosen in dict.fromkeys([*teacher.blocks, *names_of(teacher)]):
        changed = bypassed_answer(teacher, (chosen,))
        assert changed.isfinite().all()
        assert (changed - intact).abs().max() > 1e-3, chosen


@every_class
def test_a_bypass_ends_with_its_context_also_inside_another_and_after_an_error(name: str) -> None:
    teacher = teacher_of(name)
    intact, without_mid = answer_of(teacher), bypassed_answer(teacher, ("M",))
    with teacher.bypass(["M"]):
        with pytest.raises(RuntimeError, match="halfway"), teacher.bypass(["M", "D.3", "U.0"]):
            raise RuntimeError("halfway")
        assert torch.equal(answer_of(teacher), without_mid)
    assert torch.equal(answer_of(teacher), intact)


# Of a stage: down pairs and up pairs that may go together where the width is the same everywhere.
TOGETHER = ["", "0 1", "0 2", "1 0", "1 1", "01 01", "01 02", "01 12"]
STAGES = st.lists(st.sampled_from(TOGETHER), min_size=4, max_size=4)


def removal(stages: list[str], mid: bool) -> set[str]:
    removed = {"M"} if mid else set()
    for stage, pairs in enumerate(stages):
        down, _, up = pairs.partition(" ")
        removed |= {f"D.{stage}.{index}" for index in down} | {f"U.{3 - stage}.{index}" for index in up}
    return removed


@every_text_class
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(stages=STAGES, mid=st.booleans())
def test_pairs_that_face_each_other_can_go_where_the_width_is_the_same(name: str, stages: list[str], mid: bool) -> None:
    assert check_removal(teacher_of(name), removal(stages, mid))


@every_text_class
@settings(max_examples=16, deadline=None, derandomize=True, database=None)
@given(stages=STAGES, mid=st.booleans(), more=st.sets(st.sampled_from(names_of(teacher_of(SVD))), max_size=1))
def test_any_other_removal_equals_its_bypass_or_is_an_illegal_plan(
    name: str, stages: list[str], mid: bool, more: set[str]
) -> None:
    check_removal(teacher_of(name, GROWING), removal(stages, mid) | more)


@every_text_class
@pytest.mark.parametrize("stages", [1, 3])
def test_inner_stages_can_go_as_a_whole(name: str, stages: int) -> None:
    teacher = teacher_of(name)
    removed = {unit.name for unit in teacher.units if unit.depth >= 4 - stages}
    assert check_removal(teacher, removed)
    assert teacher.without(removed).stages == 4 - stages


@every_text_class
@pytest.mark.parametrize(
    ("removed", "reason"),
    [
        (["D.0.1"], r"leaves D\.0 1 pairs and U\.3 3"),
        (["D.0.0", "U.3.0"], r"hands pairs of U\.3 other skip connections"),
        (["D.1.0", "U.2.1"], r"changes what D\.1\.1 receives: 32 channels instead of 64"),
        (["D.1", "U.2.0", "U.2.1"], r"leaves D\.1 no pair, .* 32 -> 64"),
    ],
)
def test_illegal_removals_say_why(name: str, removed: list[str], reason: str) -> None:
    with pytest.raises(IllegalPlan, match=reason):
        teacher_of(name, GROWING).without(removed)


@every_class
def test_a_student_pruned_twice_is_the_teacher_without_both(name: str) -> None:
    teacher, both = teacher_of(name), (*PAPER, "D.2", "U.1", "D.1.0", "U.2.2")
    once = teacher.without(PAPER)
    twice = once.without(["D.2", "U.0", once.units[1].name, teacher.surviving(PAPER)["U.2.2"]])
    assert_same(answer_of(twice), bypassed_answer(teacher, both))
    stock = type(teacher.model)
    assert type(once.model) is type(twice.model) is STUDENTS[stock]
    assert tuple(once.model.config.removed_units) == tuple(sorted(PAPER))
    assert len(twice.model.config.removed_units) == len(names_of(teacher)) - len(twice.units)
    assert set(PAPER) < set(twice.model.config.removed_units)
    assert "removed_units" not in teacher.model.config


@pytest.mark.parametrize("name", [SVD, MOTION])
def test_a_stock_student_pruned_again_counts_from_its_own_config(name: str) -> None:
    once = teacher_of(name).without(["D.0.1", "U.3.1"])
    assert type(once.model) is type(teacher_of(name).model)
    twice = once.without(["M", "D.1.1", "U.2.1"])
    assert_same(answer_of(twice), bypassed_answer(teacher_of(name), ("D.0.1", "U.3.1", "M", "D.1.1", "U.2.1")))
    assert tuple(twice.model.config.layers_per_block) == (1, 2, 2, 2)
    assert twice.model.config.removed_units == ["D.1.1", "M", "U.2.1"]


SAVED: dict[str, tuple[str, tuple[str, ...]]] = {
    f"{name} without {what}": (name, removed)
    for name in (TEXT_3D, MOTION)
    for what, removed in {"the paper's units": PAPER, "one pair": ("D.0.1", "U.3.1")}.items()
}


@pytest.mark.parametrize("case", SAVED)
def test_a_saved_student_reloads_with_every_key_and_the_same_output(case: str, tmp_path: Path) -> None:
    name, removed = SAVED[case]
    student = teacher_of(name, GROWING).without(removed)
    save_model(student, tmp_path / "unet")
    _, info = type(student.model).from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not any(info.values())
    assert_same(answer_of(load_denoiser(tmp_path / "unet")), answer_of(student))


UNIFORM = {
    "keeps the mid block": SECOND_PAIRS,
    "has fewer stages": tuple(unit for unit in SECOND_PAIRS if unit[:3] not in INNERMOST) + INNERMOST,
    "lacks only the mid block": ("M",),
}
SAID_BY_STOCK: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"{name} with another number of pairs in each stage": (name, ("D.0.1", "U.3.1")) for name in (SVD, MOTION)},
    **{f"{name} in the paper's layout": (name, PAPER) for name in (SVD, MOTION)},
    **{f"{TEXT_3D} with equally many pairs {what}": (TEXT_3D, units) for what, units in UNIFORM.items()},
}


@pytest.fixture(scope="module")
def stock_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of every case: class, loading problems and largest difference, as a process without vdmini finds them."""
    root = tmp_path_factory.mktemp("students")
    for case, (name, removed) in SAID_BY_STOCK.items():
        student = teacher_of(name, GROWING).without(removed)
        calls: list[tuple[Any, dict[str, Any]]] = []
        stock = student.stock_form()
        handle = student.model.register_forward_pre_hook(
            lambda model, args, keywords, calls=calls: calls.append((args, keywords)), with_kwargs=True
        )
        assert_same(answer_of(UNetDenoiser(stock)), answer := answer_of(student))
        handle.remove()
        (args, keywords), *_ = calls
        stock.save_pretrained(root / case)
        answer = answer.transpose(1, 2) if name == SVD else answer  # the class's own layout
        torch.save({"args": args, "keywords": keywords, "answer": answer}, root / case / "call.pt")
    return fresh.stock_answers(root)


@pytest.mark.parametrize("case", SAID_BY_STOCK)
def test_stock_diffusers_alone_loads_the_student(case: str, stock_answers: dict[str, list[Any]]) -> None:
    cls, wrong, worst = stock_answers[case]
    assert cls == SAID_BY_STOCK[case][0]
    assert not wrong
    assert worst <= 1e-5


@every_class
def test_a_student_that_keeps_its_mid_block_is_stock_without_more_ado(name: str) -> None:
    student = teacher_of(name).without(SECOND_PAIRS)
    assert student.stock_form() is student.model
    assert type(student.model) is type(teacher_of(name).model)


@every_class
def test_the_identity_mid_block_passes_on_exactly_what_it_receives(name: str) -> None:
    student = teacher_of(name).without(["M"])
    stock = UNetDenoiser(student.stock_form())
    assert torch.equal(answer_of(stock), bypassed_answer(stock, ("M",)))
    assert torch.equal(answer_of(stock), answer_of(student))


@pytest.mark.parametrize("removed", [PAPER, ("D.0.1", "U.3.1")])
def test_unet3d_has_no_stock_form_of_unequal_stages_because_its_layers_per_block_is_one_number(
    removed: tuple[str, ...],
) -> None:
    student = teacher_of(TEXT_3D).without(removed)
    assert student.stock_form() is None
    assert type(student.model) is STUDENTS[UNet3DConditionModel]


@every_text_class
def test_there_is_no_stock_form_where_a_mid_block_would_scale_what_it_passes_on(name: str) -> None:
    teacher = new_unet_of(name, mid_block_scale_factor=2.0)
    student = teacher.without(["M"])
    assert student.stock_form() is None
    assert_same(answer_of(student), bypassed_answer(teacher, ("M",)))


@pytest.mark.parametrize(
    ("widths", "unit", "answers"),
    [
        (EVEN, "D.0.1", [("U.3.0",), ("U.3.1",)]),
        (GROWING, "D.0.1", [("U.3.1",)]),
        (EVEN, "M", [()]),
        (GROWING, "D.1.0", []),
        (GROWING, "U.3.0", []),
    ],
)
@every_class
def test_what_has_to_go_with_a_unit(
    name: str, widths: tuple[int, ...], unit: str, answers: list[tuple[str, ...]]
) -> None:
    assert list(teacher_of(name, widths).removable_with(unit)) == answers


@pytest.mark.parametrize(("widths", "unit", "stage"), [((32, 32, 64, 64), "D.2.0", 1), ((32, 32, 32, 64), "D.3.0", 2)])
def test_a_unit_that_needs_a_projection_goes_with_the_fewest_whole_stages(
    widths: tuple[int, ...], unit: str, stage: int
) -> None:
    teacher = new_unet(widths)
    (extra,) = teacher.removable_with(unit)
    assert {unit, *extra} == {other.name for other in teacher.units if other.depth >= stage}
    assert check_removal(teacher, {unit, *extra})


@all_widths
def test_every_answer_to_what_has_to_go_is_legal_minimal_and_given_once(widths: tuple[int, ...]) -> None:
    teacher = teacher_of(SVD, widths)
    for unit in names_of(teacher):
        answers = teacher.removable_with(unit)
        assert len({frozenset(extra) for extra in answers}) == len(answers)
        for extra in answers:
            smaller = itertools.chain(*(itertools.combinations(extra, size) for size in range(len(extra))))
            assert not any(is_legal(teacher, {unit, *part}) for part in smaller)
            assert is_legal(teacher, {unit, *extra})
        partners = {other for other in names_of(teacher) if other != unit and is_legal(teacher, {unit, other})}
        if answers != ((),):
            assert {extra[0] for extra in answers if len(extra) == 1} == partners


def is_legal(teacher: UNetDenoiser, removed: set[str]) -> bool:
    try:
        teacher.check(removed)
    except IllegalPlan:
        return False
    return True


@every_text_class
def test_clips_of_a_batch_have_their_own_text_and_time(name: str) -> None:
    teacher = teacher_of(name)
    latents, condition = inputs_of(name, batch=2)
    with torch.no_grad():
        both = teacher(latents, torch.tensor([500.0, 200.0]), condition)
        alone = teacher(latents[1:], torch.tensor([200.0]), {key: value[1:] for key, value in condition.items()})
        other = teacher(latents[1:], torch.tensor([200.0]), {key: value[:1] for key, value in condition.items()})
    assert_same(both[1:], alone)
    assert (other - alone).abs().max() > 0.01


@every_class
def test_features_are_videos_of_the_stated_width(name: str) -> None:
    teacher, found = new_unet_of(name, GROWING), list[Tensor]()
    for stage in teacher.encoder_stages():
        stage.register_forward_hook(lambda module, args, output: found.append(output[0]))
    inputs = inputs_of(name, batch=2)
    output_of(teacher, inputs)
    assert [teacher.as_video(feature, inputs[0]).shape[:3] for feature in found] == [
        (2, width, 4) for width in teacher.encoder_widths()
    ]


FULL_SIZE: dict[str, tuple[type[Any], dict[str, Any], int, int, str]] = {
    "ModelScope": (UNet3DConditionModel, {}, 1_411_233_860, 814_600_580, "42.3%"),
    "T2V-Turbo-v2": (
        UNet3DConditionModel,
        _diffusers_config(UNetArguments(time_cond_proj_dim=256, motion_cond_proj_dim=256)),
        1_411_397_700,
        814_764_420,
        "42.3%",
    ),
    "AnimateDiff": (UNetMotionModel, {"cross_attention_dim": 768}, 1_312_730_244, 687_421_124, "47.6%"),
}


@pytest.mark.parametrize("model", FULL_SIZE)
def test_the_papers_layout_of_a_public_model_has_so_many_parameters(model: str) -> None:
    cls, config, full, left, fewer = FULL_SIZE[model]
    with torch.device("meta"):
        teacher = UNetDenoiser(cls(**config).to("meta"))
    student = teacher.without(paper_layout(teacher, PlanSettings()))
    assert (parameters_of(teacher), parameters_of(student)) == (full, left)
    assert f"{1 - left / full:.1%}" == fewer
