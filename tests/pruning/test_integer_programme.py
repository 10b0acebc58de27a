"""The planner's programme: as good as trying everything, never illegal, exact in what it predicts, quick."""

import math
import time
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.rule_oracle import is_removable, legal_rows, names_of, stages_of
from tests.models.tiny_transformers import CONFIGS, new_condition, new_latents, new_transformer
from tests.models.tiny_unets import CLASSES, TEXT_3D, inputs_of, new_unet_of
from tests.tiny import EVEN, GROWING, new_unet
from vdmini_core.evaluation.costs import count_costs
from vdmini_core.models import Denoiser, TransformerDenoiser
from vdmini_core.models.graph import empty
from vdmini_core.models.published import published
from vdmini_core.models.removal import Piece, Rule
from vdmini_core.models.unet_rules import unet_rules
from vdmini_core.pruning.integer_programme import (
    TOLERANCE,
    Expense,
    Graph,
    ImpossibleBudget,
    front,
    least_damage,
    smallest,
    total_of,
)

BETWEEN = (-0.05, 0.0, 0.2, 0.5, 0.8, 1.0)
"""Budgets from the least possible one, 0, to everything, 1."""
SMALL = {
    "even": lambda: new_unet(EVEN),
    "growing": lambda: new_unet(GROWING),
    "text": lambda: new_unet_of(TEXT_3D, (32, 32, 64, 64)),
    "pruned": lambda: new_unet(GROWING).without(["D.0.1", "U.3.1", "D.3", "M", "U.0"]),
    "svd-xt": lambda: published("svd-xt"),
    **{name: lambda name=name: new_transformer(name) for name in CONFIGS},
}


def parameters_of(denoiser: Denoiser) -> Expense:
    parts = {
        part.name: sum(p.numel() for path in part.modules for p in denoiser.model.get_submodule(path).parameters())
        for part in (*denoiser.units, *denoiser.pieces)
    }
    return Expense("parameters", sum(p.numel() for p in denoiser.model.parameters()), parts)


def drawn(names: tuple[str, ...], seed: int, *, ties: bool = False) -> dict[str, float]:
    """Damages; with `ties` many are equal and some are 0."""
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 3, len(names)) if ties else draw.exponential(size=len(names))
    return dict(zip(names, map(float, values), strict=True))


class BruteForce:
    """Every legal removal with its cost."""

    def __init__(self, graph: Graph, expense: Expense) -> None:
        self.graph, self.rows = graph, legal_rows(graph.units, graph.rules)
        self.left = np.full(len(self.rows), float(expense.whole))
        self.left -= (1 - self.rows) @ np.array([expense.parts[unit] for unit in graph.units], dtype=float)
        for piece in graph.pieces:
            columns = [graph.units.index(unit) for unit in piece.units]
            self.left -= expense.parts[piece.name] * (self.rows[:, columns] == 0).all(1)

    def best(self, damage: Mapping[str, float], limit: float) -> tuple[float, float] | None:
        """Least damage within the limit, and the most cost that is left with it; None where nothing is."""
        within = self.left <= limit * (1 + TOLERANCE)
        if not within.any():
            return None
        damages = ((1 - self.rows) @ np.array([damage[unit] for unit in self.graph.units]))[within]
        least = damages.min()
        return float(least), float(self.left[within][damages <= least + 1e-9].max())


@pytest.mark.parametrize("name", SMALL)
def test_the_plan_is_the_best_of_all_legal_ones(name: str) -> None:
    denoiser = SMALL[name]()
    graph, expense = Graph.of(denoiser), parameters_of(denoiser)
    everything = BruteForce(graph, expense)
    assert len(everything.rows) >= 8
    least = everything.left.min() / expense.whole
    for seed, place in enumerate(BETWEEN):
        ratio = least + place * (1 - least)
        for ties in (False, True):
            damage = drawn(graph.units, seed, ties=ties)
            expected = everything.best(damage, ratio * expense.whole)
            if expected is None:
                assert place < 0
                with pytest.raises(ImpossibleBudget):
                    least_damage(graph, damage, expense, ratio)
                continue
            removed = least_damage(graph, damage, expense, ratio)
            denoiser.check(removed)
            found = total_of(damage, removed), expense.left(graph, removed)
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["growing", "svd-xt"])
def test_nothing_legal_beats_a_point_of_the_front_in_cost_and_damage(name: str) -> None:
    denoiser = SMALL[name]()
    graph, expense = Graph.of(denoiser), parameters_of(denoiser)
    damage, everything = drawn(graph.units, 7), BruteForce(graph, expense)
    points = front(graph, damage, expense, points=9)
    assert points[-1] == (1.0, ())
    assert points[0][0] == everything.left.min() / expense.whole
    damages = (1 - everything.rows) @ np.array([damage[unit] for unit in graph.units])
    for ratio, removed in points:
        cheaper = everything.left <= ratio * expense.whole * (1 + TOLERANCE)
        assert damages[cheaper].min() == pytest.approx(total_of(damage, removed))
    assert [ratio for ratio, _ in points] == sorted({ratio for ratio, _ in points})


def drawn_graph(data: st.DataObject) -> tuple[Graph, list[object] | None]:
    """A U-Net with its stages, or a transformer (None) some of whose blocks have to stay."""
    if data.draw(st.booleans()):
        names = tuple(f"block.{i}" for i in range(data.draw(st.integers(1, 24))))
        return Graph(names, (Rule(dict.fromkeys(names, 1), 1, len(names), lambda removed: "leaves no block"),)), None
    widths = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4))
    stages = stages_of(widths, data.draw(st.lists(st.integers(1, 3), min_size=len(widths), max_size=len(widths))))
    units = tuple(names_of(stages, "M"))
    inner = [["M", *(name for stage in stages[depth:] for name in stage.surplus())] for depth in range(1, len(stages))]
    pieces = tuple(Piece(f"samplers.{depth}", tuple(names), ()) for depth, names in enumerate(inner, 1))
    return Graph(units, unet_rules(stages, "M"), pieces), list(stages)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.data(), st.integers(0, 2**32 - 1), st.floats(0.01, 1), st.booleans())
def test_no_budget_and_no_graph_gives_an_illegal_plan(data: st.DataObject, seed: int, ratio: float, ties: bool) -> None:
    graph, stages = drawn_graph(data)
    draw = np.random.default_rng(seed)
    names = [*graph.units, *(piece.name for piece in graph.pieces)]
    parts = dict(zip(names, map(float, draw.integers(0, 10**9, len(names))), strict=True))
    expense = Expense("parameters", float(sum(parts.values()) * draw.uniform(1, 1.5) + 1), parts)
    protected = [unit for unit in graph.units if draw.random() < 0.1]
    damage = drawn(graph.units, seed, ties=ties)
    free = graph.keeping(protected)
    try:
        removed = least_damage(free, damage, expense, ratio)
    except ImpossibleBudget as error:
        refused, ratio = ratio, error.nearest
        removed = least_damage(free, damage, expense, ratio)
        assert refused < expense.left(graph, removed) / expense.whole
    assert expense.left(graph, removed) <= ratio * expense.whole * (1 + TOLERANCE)
    assert not set(removed) & set(protected)
    assert len(removed) < len(graph.units)
    assert stages is None or is_removable(stages, removed)


@pytest.mark.parametrize("name", ["growing", "WanTransformer3DModel"])
def test_an_impossible_budget_is_refused_with_the_nearest_possible_one(name: str) -> None:
    denoiser = SMALL[name]()
    graph, expense = Graph.of(denoiser), parameters_of(denoiser)
    damage, everything = drawn(graph.units, 0), BruteForce(graph, expense)
    least = everything.left.min() / expense.whole
    told = rf"no legal removal leaves 0\.01 of the teacher's parameters.*budget is {math.ceil(least * 1e4) / 1e4:.4f}"
    with pytest.raises(ImpossibleBudget, match=told) as refusal:
        least_damage(graph, damage, expense, 0.01)
    assert refusal.value.nearest == least
    removed = least_damage(graph, damage, expense, math.ceil(least * 1e4) / 1e4)
    assert expense.left(graph, removed) / expense.whole == least


def test_what_is_protected_stays_and_makes_the_least_budget_larger() -> None:
    graph, expense = Graph.of(SMALL["growing"]()), parameters_of(SMALL["growing"]())
    free, held = (smallest(some, expense) for some in (graph, graph.keeping(["D.2.0", "M"])))
    assert {"D.2.0", "M"} <= set(free)
    assert not {"D.2.0", "M"} & set(held)
    assert expense.left(graph, held) > expense.left(graph, free)


@cache
def large(name: str) -> TransformerDenoiser | Denoiser:
    if name == "hunyuan-video-1.5":
        return TransformerDenoiser(empty(HunyuanVideo15Transformer3DModel, {}).to("meta").eval())
    return published(name)


@pytest.mark.parametrize(
    ("name", "units"),
    [("hunyuan-video", 60), ("hunyuan-video-1.5", 54), ("mochi", 48), ("wan-2.1-14b", 40), ("svd-xt", 21)],
)
def test_a_full_size_model_is_planned_in_seconds(name: str, units: int) -> None:
    denoiser = large(name)
    graph, expense = Graph.of(denoiser), parameters_of(denoiser)
    assert len(graph.units) == units
    start = time.process_time()
    removed = least_damage(graph, drawn(graph.units, 0), expense, 0.6)
    assert time.process_time() - start < 5
    denoiser.check(removed)
    student = denoiser.without(removed)
    assert sum(p.numel() for p in student.model.parameters()) == expense.left(graph, removed) <= 0.6 * expense.whole


@pytest.mark.parametrize("name", [*CLASSES, "HunyuanVideoTransformer3DModel"])
def test_predicted_parameters_and_flops_are_those_of_the_student(name: str) -> None:
    unet = name in CLASSES
    denoiser = (new_unet_of(name, GROWING) if unet else new_transformer(name)).on_meta()
    inputs = inputs_of(name) if unet else (new_latents(), new_condition())
    whole = count_costs(denoiser, *inputs).table()
    graph = Graph.of(denoiser)
    by_kind = {
        kind: Expense(kind, getattr(whole.whole, kind), {part: getattr(c, kind) for part, c in whole.parts.items()})
        for kind in ("parameters", "flops")
    }
    # The smallest student has lost every stage but one, and with them their samplers.
    removals = [smallest(graph, by_kind["parameters"])]
    removals += [least_damage(graph, drawn(graph.units, seed), by_kind["flops"], ratio) for seed, ratio in ((1, 0.8),)]
    for removed in removals:
        with torch.no_grad():
            student = count_costs(denoiser.without(removed), *inputs)
        found = {kind: expense.left(graph, removed) for kind, expense in by_kind.items()}
        assert found == {"parameters": student.parameters, "flops": student.flops}
