"""The rules of removal say exactly what can be removed: against the networks themselves, and a walk with names."""

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.rule_oracle import is_removable, legal_sets, names_of, stages_of
from tests.models.tiny_transformers import new_transformer
from tests.tiny import EMBEDDING, EVEN, FRAMES, GROWING, new_inputs, new_unet, output_of
from vdmini_core.models import IllegalPlan, UNetDenoiser
from vdmini_core.models.unet import delete_units
from vdmini_core.models.unet_rules import unet_rules


def all_sets(units: Sequence[str]) -> list[set[str]]:
    return [set(some) for size in range(len(units) + 1) for some in itertools.combinations(units, size)]


def small_unet(widths: tuple[int, ...]) -> UNetDenoiser:
    torch.manual_seed(0)
    kinds = "CrossAttn{}BlockSpatioTemporal"
    model = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=1,
        num_attention_heads=tuple(width // 32 for width in widths),
        down_block_types=(*[kinds.format("Down")] * (len(widths) - 1), "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", *[kinds.format("Up")] * (len(widths) - 1)),
        cross_attention_dim=EMBEDDING,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=FRAMES,
    )
    return UNetDenoiser(model.eval().requires_grad_(False))


def reads_every_skip(removed: set[str]) -> bool:
    """Whether both stages have one up pair more than down pairs; the inner one may have none of either."""
    blocks = {"D.0.0"}, {"U.1.0", "U.1.1"}, {"D.1.0"}, {"U.0.0", "U.0.1"}
    down, up, inner_down, inner_up = (len(block - removed) for block in blocks)
    return up == down + 1 and (inner_up == inner_down + 1 or (inner_up == inner_down == 0 and "M" in removed))


@pytest.mark.parametrize("widths", [(32, 32), (32, 64)])
def test_what_the_rules_allow_is_what_surgery_can_do(widths: tuple[int, ...]) -> None:
    teacher, inputs = small_unet(widths), new_inputs(size=8)
    names = [unit.name for unit in teacher.units]
    works = set()
    for removed in (some for some in all_sets(names) if reads_every_skip(some)):
        model = copy.deepcopy(teacher.model)
        delete_units(UNetDenoiser(model), removed)
        try:
            answer = output_of(UNetDenoiser(model), inputs)
        except RuntimeError:  # a width that does not fit
            continue
        with teacher.bypass(removed):
            if torch.allclose(answer, output_of(teacher, inputs), rtol=0, atol=1e-5):
                works.add(frozenset(removed))
    assert works == legal_sets(names, teacher.rules)


@pytest.mark.parametrize(
    ("widths", "pairs"),
    [
        ((1, 2, 2), (2, 2, 2)),
        ((1, 2, 4), (1, 1, 1)),
        ((1, 2, 1), (2, 1, 1)),
        ((1, 1, 2, 2), (1, 1, 1, 1)),
        ((1, 1), (3, 1)),
        ((1, 2), (2, 2)),
        ((2, 2), (2, 0)),
        ((1,), (3,)),
    ],
)
def test_the_rules_allow_exactly_what_a_walk_along_the_skips_allows(
    widths: tuple[int, ...], pairs: tuple[int, ...]
) -> None:
    stages = stages_of(widths, pairs)
    names = names_of(stages, "M")
    expected = {frozenset(removed) for removed in all_sets(names) if is_removable(stages, removed)}
    assert legal_sets(names, unet_rules(stages, "M")) == expected
    without_mid = legal_sets(names_of(stages, None), unet_rules(stages, None))
    assert without_mid == {removed - {"M"} for removed in expected if "M" in removed}


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_so_they_do_on_any_graph_and_any_removal(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4))
    pairs = data.draw(st.lists(st.integers(1, 3), min_size=len(widths), max_size=len(widths)))
    stages = stages_of(widths, pairs)
    names = names_of(stages, "M")
    removed = set(data.draw(st.sets(st.sampled_from(names))))
    # Whole stages are rare among random sets; let the inner ones go in most cases.
    for stage in stages[data.draw(st.integers(1, len(stages))) :]:
        removed |= {"M", *stage.surplus()}
    rules = unet_rules(stages, "M")
    assert all(rule.holds(removed) for rule in rules) == is_removable(stages, removed)


@pytest.mark.parametrize("widths", [EVEN, GROWING])
def test_a_real_unet_has_the_rules_of_its_stages(widths: tuple[int, ...]) -> None:
    teacher, stages = new_unet(widths), stages_of(widths, (2, 2, 2, 2))
    names = [unit.name for unit in teacher.units]
    assert names == names_of(stages, "M")
    found, expected = teacher.rules, unet_rules(stages, "M")
    assert [(rule.terms, rule.low, rule.high) for rule in found] == [(r.terms, r.low, r.high) for r in expected]


def test_a_pruned_unets_rules_are_those_of_its_own_graph() -> None:
    once = new_unet(GROWING).without(["D.0.1", "U.3.1", "D.3", "M", "U.0"])
    stages = stages_of(GROWING[:3], (1, 2, 2))
    found = [(rule.terms, rule.low, rule.high) for rule in once.rules]
    assert found == [(rule.terms, rule.low, rule.high) for rule in unet_rules(stages, None)]


def test_what_changes_the_width_goes_with_the_stages_inside_and_is_bypassed_as_such() -> None:
    teacher, inputs = new_unet(GROWING), new_inputs(size=8)
    inner = {unit.name for unit in teacher.units if unit.depth >= 1}
    with pytest.raises(IllegalPlan, match=r"changes what U\.3\.0 receives: 32 .* 64.*; remove it as well, with a pair"):
        teacher.check(inner)
    removed = inner | {"D.0.1", "U.3.0"}
    student = teacher.without(removed)
    with teacher.bypass(removed):
        torch.testing.assert_close(output_of(student, inputs), output_of(teacher, inputs), rtol=0, atol=1e-5)


def test_a_transformers_rules_keep_a_block_and_the_last_where_it_has_to_stay() -> None:
    for name, fewer in (("WanTransformer3DModel", 1), ("MochiTransformer3DModel", 8)):
        teacher = new_transformer(name)
        legal = legal_sets([unit.name for unit in teacher.units], teacher.rules)
        assert len(legal) == 16 - fewer
