"""Students of equal size: what is legal is listed, sizes are counted right, and controls choose among equals."""

from pathlib import Path

import pytest

from tests.models.tiny_transformers import new_transformer
from tests.tiny import GROWING, new_inputs, new_unet, output_of, write_latents
from vdmini_core.data.latents import LatentCache
from vdmini_core.diffusion.process import VPrediction
from vdmini_core.models import IllegalPlan, UNetDenoiser
from vdmini_core.pruning.baselines import (
    METHODS,
    Pruning,
    Removal,
    legal_removals,
    parameters_of,
    random_removal,
    removal_sizes,
    removals_of_size,
    student_by,
    unevenness,
    uniform_removal,
    without_units,
)
from vdmini_core.pruning.channels import TOLERANCE

PAPER = ("D.0.1", "D.1.1", "D.3.0", "D.3.1", "M", "U.0.0", "U.0.1", "U.0.2", "U.2.1", "U.3.1")


@pytest.fixture(scope="module")
def teacher() -> UNetDenoiser:
    return new_unet(GROWING)


@pytest.fixture(scope="module")
def removals(teacher: UNetDenoiser) -> list[Removal]:
    return legal_removals(teacher)


@pytest.fixture(scope="module")
def candidates(teacher: UNetDenoiser) -> list[Removal]:
    """Those of the size of the paper's layout; listing them takes seconds."""
    return removals_of_size(teacher, parameters_of(teacher.on_meta().without(PAPER, shared=True)))


@pytest.fixture
def data(tmp_path: Path) -> LatentCache:
    return write_latents(tmp_path, 2, size=8)


def test_all_that_is_listed_is_legal_and_the_papers_layout_is_among_it(
    teacher: UNetDenoiser, removals: list[Removal]
) -> None:
    assert len(set(removals)) == len(removals) > 1000
    assert {(), ("M",), ("D.0.1", "U.3.1"), PAPER} <= set(removals)
    outer = tuple(unit.name for unit in teacher.units if unit.depth > 0 or unit.name in ("D.0.1", "U.3.0"))
    assert outer in removals  # U.3.0 changes the width, which it need not once there is nothing inside
    for removal in removals[:: len(removals) // 9]:
        teacher.check(removal)


def test_sizes_are_those_of_the_networks(teacher: UNetDenoiser, removals: list[Removal]) -> None:
    """Samplers of whole stages included: the last of the list leave the fewest stages."""
    some = [(), PAPER, removals[len(removals) // 2], removals[-1]]
    twin, sizes = teacher.on_meta(), removal_sizes(teacher, removals)
    assert {r: sizes[r] for r in some} == {r: parameters_of(twin.without(r, shared=True)) for r in some}


def test_controls_have_the_size_of_the_papers_layout(teacher: UNetDenoiser, candidates: list[Removal]) -> None:
    pruning = Pruning(teacher, VPrediction(), None, seed=4)  # type: ignore[arg-type]
    assert pruning.layout == PAPER
    assert PAPER in candidates
    for method in ("paper", "random"):
        student = student_by(method, pruning)
        assert student.removed in candidates
        assert abs(parameters_of(student.denoiser) / pruning.budget - 1) <= TOLERANCE
        assert student.channels == {}
        assert output_of(student.denoiser, new_inputs()).isfinite().all()


def test_random_removals_follow_from_their_seed_alone(candidates: list[Removal]) -> None:
    drawn = [random_removal(candidates, seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_the_uniform_removal_is_the_most_even_of_its_size(teacher: UNetDenoiser, candidates: list[Removal]) -> None:
    names = [unit.name for unit in teacher.units]
    chosen = uniform_removal(candidates, names)
    assert unevenness(names, chosen) == min(unevenness(names, removal) for removal in candidates)
    assert unevenness(names, chosen) < unevenness(names, PAPER)


@pytest.mark.parametrize(
    ("removal", "expected"),
    [(("b", "d"), 0.25), (("a", "b"), 0.5), (("d",), 0.75), (("a", "b", "c", "d"), 0.0)],
)
def test_evenness_is_the_largest_distance_of_the_two_distributions(removal: Removal, expected: float) -> None:
    # Of four units: after each, the share removed so far against a quarter, a half, three quarters, all.
    assert unevenness("abcd", removal) == pytest.approx(expected)


def test_a_size_that_no_removal_leaves_is_refused_with_the_nearest(teacher: UNetDenoiser) -> None:
    with pytest.raises(IllegalPlan, match=r"no legal removal leaves 1,000 parameters within 1%; the nearest leaves \d"):
        removals_of_size(teacher, 1000)


def test_transformers_are_refused() -> None:
    with pytest.raises(IllegalPlan, match="too many to list"):
        removals_of_size(new_transformer("WanTransformer3DModel"), 1000)


def test_an_unknown_method_is_refused_with_those_there_are(teacher: UNetDenoiser, data: LatentCache) -> None:
    with pytest.raises(ValueError, match=f"no pruning method 'best'; the methods are {', '.join(METHODS)}"):
        student_by("best", Pruning(teacher, VPrediction(), data, 0))


def test_blocks_may_be_named_instead_of_their_units(teacher: UNetDenoiser, data: LatentCache) -> None:
    student = without_units(Pruning(teacher, VPrediction(), data, 0), ("D.3", "M", "U.0"))
    assert student.removed == ("D.3.0", "D.3.1", "M", "U.0.0", "U.0.1", "U.0.2")


def test_channels_go_until_the_budget_is_met(teacher: UNetDenoiser, data: LatentCache) -> None:
    pruning = Pruning(teacher, VPrediction(), data, 0)
    student = student_by("depgraph-taylor", pruning)
    assert abs(parameters_of(student.denoiser) / pruning.budget - 1) <= TOLERANCE
    assert student.removed == ()
    assert set(student.channels) == {unit.name for unit in teacher.units}
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
