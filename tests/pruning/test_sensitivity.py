"""Sensitivity on two clips: every block and pair is scored, and what does nothing costs nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import GROWING, PROVENANCE, new_model, write_latents
from vdmini_core.artifacts import Estimate, Quality, SensitivityReport, UnitScore
from vdmini_core.data.latents import LatentCache
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.models import Pipeline, UNetDenoiser, load_pipeline
from vdmini_core.pruning import sweep
from vdmini_core.pruning.criteria import CRITERIA
from vdmini_core.pruning.sensitivity import Sensitivity, correlations, sensitivity_table, teacher_gates
from vdmini_core.pruning.sweep import decided
from vdmini_core.settings import SensitivitySettings

IDLE = "D.0.1"
SETTINGS = SensitivitySettings(
    clips=2, steps=2, batch_size=1, latency_runs=1, gate_clips=3, calibration_clips=1, stop_early=False
)
FEW = ("D.0", "D.1.0", "U.3.1")


def new_evaluator() -> Evaluator:
    torch.manual_seed(0)
    return Evaluator().eval().requires_grad_(False)


def make_idle(denoiser: UNetDenoiser) -> None:
    """One of its pairs adds exactly nothing to what it receives."""
    block = denoiser.model.down_blocks[0]
    resnet, attention = block.resnets[1], block.attentions[1]
    for layer in (resnet.spatial_res_block.conv2, resnet.temporal_res_block.conv2, attention.proj_out):
        layer.weight.zero_()
        layer.bias.zero_()
    resnet.time_mixer.mix_factor.fill_(1e4)  # a mixing weight of exactly 0 or 1, so nothing is rounded


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return write_latents(tmp_path_factory.mktemp("latents"), 6)


@pytest.fixture(scope="module")
def growing(tiny_pipeline_folder: Path) -> Pipeline:
    """A pipeline whose U-Net changes its width between stages."""
    pipeline = load_pipeline(tiny_pipeline_folder, ["denoiser", "vae"])
    pipeline.models["unet"] = UNetDenoiser(new_model(GROWING))
    return pipeline


@pytest.fixture(scope="module")
def report(tiny_pipeline_folder: Path, data: LatentCache) -> SensitivityReport:
    """Of a pipeline one of whose pairs is idle."""
    pipeline = load_pipeline(tiny_pipeline_folder, ["denoiser", "vae"])
    make_idle(pipeline.denoiser)
    settings = SETTINGS.model_copy(update={"steps": 1, "batch_size": 2})
    return Sensitivity(pipeline, data, new_evaluator(), settings).report({"clips": 2}, PROVENANCE)


def test_every_block_and_every_pair_is_scored_once(report: SensitivityReport) -> None:
    names = [(score.name, score.kind) for score in report.scores]
    assert len(set(names)) == len(names) == 9 + 20
    assert ("M", "block") in names
    assert ("M", "pair") not in names


def test_bypassing_a_pair_that_does_nothing_scores_exactly_as_the_baseline(report: SensitivityReport) -> None:
    (idle,) = (score for score in report.scores if score.name == IDLE)
    nothing = Estimate(value=0, low=0, high=0)
    assert idle.quality == report.baseline
    assert idle.content == idle.motion == nothing
    assert all(estimate == nothing for estimate in idle.paired.values())
    assert idle.criteria["block_influence"] == pytest.approx(0, abs=1e-6)
    assert idle.criteria["output_mse"] == 0
    assert idle.parameters > 0
    assert idle.flops > 0


def test_bypassing_any_other_unit_changes_the_score(report: SensitivityReport) -> None:
    assert [score.name for score in report.scores if score.quality == report.baseline] == [IDLE]
    assert [score.name for score in report.scores if score.content.value == 0 or score.motion.value == 0] == [IDLE]
    assert all(score.content.low <= score.content.value <= score.content.high for score in report.scores)


def test_the_controls_are_nothing_and_the_mean_unit(report: SensitivityReport) -> None:
    nothing, chance = report.controls["no-op"], report.controls["random unit"]
    assert nothing == dict.fromkeys(("content", "motion"), Estimate(value=0, low=0, high=0))
    units = [score for score in report.scores if score.kind == "pair" or score.name == "M"]
    assert chance["motion"].value == pytest.approx(sum(unit.motion.value for unit in units) / len(units))


def test_a_block_costs_what_its_pairs_cost_and_has_the_sum_of_their_criteria(report: SensitivityReport) -> None:
    by_name = {score.name: score for score in report.scores}
    for block in ("D.0", "U.3"):
        pairs = [score for name, score in by_name.items() if name.startswith(f"{block}.")]
        assert by_name[block].parameters == sum(pair.parameters for pair in pairs)
        assert by_name[block].flops == sum(pair.flops for pair in pairs)
        for name in CRITERIA:
            assert by_name[block].criteria[name] == pytest.approx(sum(pair.criteria[name] for pair in pairs))


def test_the_table_has_a_row_for_the_baseline_every_score_and_both_controls(report: SensitivityReport) -> None:
    page = sensitivity_table(report)
    rows = [line.split("|")[1].strip() for line in page.split("\n\n")[0].splitlines()[2:]]
    controls = ["no-op (control)", "random unit (control)"]
    assert rows == ["nothing", *(score.name for score in report.scores), *controls]
    assert "Teacher gates (N = 3)" in page


def values_of(analysis: Sensitivity, name: str) -> torch.Tensor:
    found = analysis.sweep.measured(name)
    return torch.stack([found["content"], found["motion"], found["clip_mse"]])


def test_scores_with_a_shared_start_are_those_without(growing: Pipeline, data: LatentCache) -> None:
    found = []
    for share in (True, False):
        settings = SETTINGS.model_copy(update={"share_start": share})
        analysis = Sensitivity(growing, data, new_evaluator(), settings)
        for round_ in range(analysis.sweep.rounds):
            analysis.measure(FEW, round_)
        found.append({name: values_of(analysis, name) for name in FEW})
        assert analysis.sweep.measured("U.3.1")["calls"].tolist() == ([1, 1] if share else [2, 0])
    for name in FEW:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-6)
        assert (found[0][name] > 0).all()


def test_units_measured_by_several_processes_and_after_a_break_give_the_same_report(
    growing: Pipeline, data: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"steps": 1, "stop_early": True})
    monkeypatch.setattr(sweep, "FEWEST", 1)  # so that some units stop

    def analysis(folder: str) -> Sensitivity:
        found = Sensitivity(growing, data, new_evaluator(), settings, scratch=tmp_path / folder)
        monkeypatch.setattr(type(found), "groups", property(lambda self: (["D.0", "U.3"], list(FEW[1:]))))
        return found

    alone = analysis("alone")
    alone.sweep.run(alone.groups)
    assert 1 in alone.sweep.taken.values()
    for round_ in range(alone.sweep.rounds):
        for share in (0, 1):
            worker = analysis("shared")
            worker.measure(worker.open_units(round_)[share::2], round_)
    together = analysis("shared")
    measured = []
    monkeypatch.setattr(type(together.sweep), "_keep", lambda self, name, *rest: measured.append(name))
    for round_ in range(together.sweep.rounds):
        together.measure(together.open_units(round_), round_)
    assert measured == []
    assert together.sweep.taken == alone.sweep.taken
    for name in ("D.0", "U.3", *FEW[1:]):
        assert torch.equal(values_of(alone, name), values_of(together, name))


def test_a_fitted_map_stands_in_where_the_width_changes_and_does_less_damage_to_the_answer(
    growing: Pipeline, data: LatentCache
) -> None:
    analysis = Sensitivity(growing, data, new_evaluator(), SETTINGS)
    assert set(analysis.stand_ins) == {"D.1.0", "U.3.0"}
    (batch,) = analysis.calibration
    denoiser, unit = growing.denoiser, next(u for u in growing.denoiser.units if u.name == "D.1.0")
    resnet, last = (growing.denoiser.model.get_submodule(unit.modules[index]) for index in (0, -1))
    seen: dict[str, torch.Tensor] = {}
    handles = [
        resnet.register_forward_pre_hook(lambda module, args: seen.update(x=args[0])),
        last.register_forward_hook(lambda module, args, output: seen.update(y=output[0])),
    ]
    with torch.no_grad():
        batch.answer(denoiser)
    for handle in handles:
        handle.remove()
    x, y = (seen[key].movedim(1, -1).flatten(0, -2).double() for key in "xy")
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    expected = x @ torch.linalg.pinv(x) @ y
    fitted = analysis.stand_ins["D.1.0"](seen["x"]).movedim(1, -1).flatten(0, -2).double()
    torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=1e-4)
    shortcut = resnet.spatial_res_block.conv_shortcut(seen["x"]).movedim(1, -1).flatten(0, -2).double()
    assert (fitted - y).square().mean() < (shortcut - y).square().mean()


def test_clips_that_nothing_else_uses_are_demanded(growing: Pipeline, data: LatentCache) -> None:
    settings = SETTINGS.model_copy(update={"calibration_clips": 3})
    with pytest.raises(ValueError, match=r"6 training clips are encoded; sensitivity needs 7: .*encode\.train_clips"):
        Sensitivity(growing, data, new_evaluator(), settings)


def test_an_unknown_unit_is_refused(growing: Pipeline, data: LatentCache) -> None:
    with pytest.raises(ValueError, match=r"no unit D\.9; there are D\.0, "):
        Sensitivity(growing, data, new_evaluator(), SETTINGS).measure(["D.9"], 0)


def quality(content: float | None, motion: float | None) -> Quality:
    return Quality(clips=2, content_accuracy=content, motion_accuracy=motion, content_distance=1, motion_distance=1)


def score(name: str, judged: Quality) -> UnitScore:
    damage = Estimate(value=0.1, low=0, high=0.2)
    cost = {"parameters": 1, "flops": 1, "latency_ms": 1}
    return UnitScore(
        name=name, kind="block", depth=2, **cost, quality=judged, content=damage, motion=damage, criteria={}
    )


DEEP = "bypassing D.2 or U.1 costs >= 0.1 accuracy"


@pytest.mark.parametrize(
    ("baseline", "gates"),
    [
        (quality(0.95, 0.85), {"content accuracy >= 0.9": True, "motion accuracy >= 0.9": False, DEEP: True}),
        (quality(0.9, 0.9), {"content accuracy >= 0.9": True, "motion accuracy >= 0.9": True, DEEP: True}),
        (quality(0.75, 0.75), {"content accuracy >= 0.9": False, "motion accuracy >= 0.9": False, DEEP: False}),
    ],
)
def test_the_gates_want_an_accurate_teacher_and_one_deep_block_that_matters(
    baseline: Quality, gates: dict[str, bool]
) -> None:
    scores = [score("D.2", quality(0.9, 0.7)), score("U.1", quality(0.9, 0.9)), score("D.0", quality(0, 0))]
    assert teacher_gates(baseline, {2: baseline}, scores) == gates


@pytest.mark.parametrize("harmful", ["D.2", "U.1"])
@pytest.mark.parametrize("judged", [quality(0.8, 0.95), quality(0.95, 0.8)])
def test_either_deep_block_and_either_accuracy_is_enough(harmful: str, judged: Quality) -> None:
    harmless = quality(0.95, 0.95)
    scores = [score(name, judged if name == harmful else harmless) for name in ("D.2", "U.1")]
    assert teacher_gates(harmless, {2: harmless}, scores)[DEEP]


def test_a_loss_elsewhere_is_no_deep_block_and_without_deep_blocks_there_is_no_such_gate() -> None:
    harmless = quality(0.95, 0.95)
    scores = [score("D.0", quality(0, 0)), score("D.2", harmless), score("U.1", harmless)]
    assert teacher_gates(harmless, {2: harmless}, scores)[DEEP] is False
    assert DEEP not in teacher_gates(harmless, {2: harmless}, scores[:1])


def test_there_are_no_gates_for_clips_without_labels() -> None:
    unknown = quality(None, None)
    assert teacher_gates(unknown, {2: unknown}, [score("D.2", unknown)]) == {}


def test_a_criterion_that_ranks_as_measured_correlates_by_one_and_a_constant_one_not_at_all() -> None:
    harmless = quality(0.95, 0.95)

    def unit(depth: int, content: float, motion: float) -> UnitScore:
        damages = {name: Estimate(value=v, low=v, high=v) for name, v in (("content", content), ("motion", motion))}
        criteria = {"exact": content * 100, "reverse": -content, "constant": 1.0}
        return score(f"D.{depth}", harmless).model_copy(update={"depth": depth, "criteria": criteria, **damages})

    found = correlations([unit(0, 0.3, 0.1), unit(1, 0.2, 0.2), unit(2, 0.1, 0.3)])
    assert found["exact"] == pytest.approx({"content": 1, "motion": -1})
    assert found["reverse"] == pytest.approx({"content": -1, "motion": 1})
    assert found["constant"] == {}
    assert found["depth"] == pytest.approx({"content": -1, "motion": 1, "motion_share": 1})
    inert = unit(3, 1e-5, 1e-6)  # a share of next to nothing says nothing
    assert correlations([unit(0, 0.3, 0.1), unit(1, 0.2, 0.2), inert])["depth"]["motion_share"] == pytest.approx(1)


def test_units_are_decided_where_harmless_low_or_in_rank_in_content_and_in_motion() -> None:
    near = np.array([0.9, 1.1, 1.0, 1.0])
    content = {"inert": near * 1e-5, "low": near * 0.01, "mixed": near * 0.02}
    content |= {"a": near, "b": near * 1.05, "top": near * 9}
    assert decided({"content": content, "motion": content}, SETTINGS) == {"inert", "low", "mixed", "top"}
    assert decided({"content": content}, SETTINGS, always=("inert", "low")) == {"inert", "mixed", "top"}
    motion = content | {"mixed": near * 1.02, "top": near * 1.01}
    assert decided({"content": content, "motion": motion}, SETTINGS) == {"inert", "low"}


def test_a_network_without_pairs_is_decided_by_its_blocks(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"clips": 8, "batch_size": sweep.FEWEST, "stop_early": True})
    names = [f"block.{index}" for index in range(3)]
    found = sweep.Sweep(None, None, None, settings, {}, first=0, folder=tmp_path)  # type: ignore[arg-type]
    for index, name in enumerate(names):
        damage = {measure: torch.full((sweep.FEWEST,), index / 10) for measure in sweep.DECIDING}
        found._keep(name, 0, damage | {"calls": torch.tensor((1, 0))})
    assert found.open_in(1, (names, [])) == []
    assert set(found.taken.values()) == {1}
