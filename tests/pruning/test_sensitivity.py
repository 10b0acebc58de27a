"""Sensitivity on two clips: every block and pair is scored, and what does nothing costs nothing."""

from pathlib import Path

import pytest
import torch

from tests.tiny import PROVENANCE, write_latents
from vdmini_core.artifacts import Quality, SensitivityReport, UnitScore
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.models import load_pipeline
from vdmini_core.pruning.sensitivity import measure_sensitivity, sensitivity_table, teacher_gates
from vdmini_core.settings import SensitivitySettings

IDLE = "D.0.1"


@pytest.fixture(scope="module")
def report(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SensitivityReport:
    """Of a pipeline one of whose pairs adds exactly nothing to what it receives."""
    pipeline = load_pipeline(tiny_pipeline_folder, ["denoiser", "vae"])
    block = pipeline.denoiser.model.down_blocks[0]
    resnet, attention = block.resnets[1], block.attentions[1]
    for layer in (resnet.spatial_res_block.conv2, resnet.temporal_res_block.conv2, attention.proj_out):
        layer.weight.zero_()
        layer.bias.zero_()
    resnet.time_mixer.mix_factor.fill_(1e4)  # a mixing weight of exactly 0 or 1, so nothing is rounded
    torch.manual_seed(0)
    evaluator = Evaluator().eval().requires_grad_(False)
    data = write_latents(tmp_path_factory.mktemp("latents"), 4)
    settings = SensitivitySettings(clips=2, steps=1, batch_size=2, latency_runs=1)
    return measure_sensitivity(pipeline, data, evaluator, settings, {"clips": 2}, PROVENANCE)


def test_every_block_and_every_pair_is_scored_once(report: SensitivityReport) -> None:
    names = [(score.name, score.kind) for score in report.scores]
    assert len(set(names)) == len(names) == 9 + 20
    assert ("M", "block") in names
    assert ("M", "pair") not in names


def test_bypassing_a_pair_that_does_nothing_scores_exactly_as_the_baseline(report: SensitivityReport) -> None:
    (idle,) = (score for score in report.scores if score.name == IDLE)
    assert idle.quality == report.baseline
    assert idle.parameters > 0
    assert idle.flops > 0


def test_bypassing_any_other_unit_changes_the_score(report: SensitivityReport) -> None:
    same = [score.name for score in report.scores if score.quality == report.baseline]
    assert same == [IDLE]


def test_a_block_costs_what_its_pairs_cost(report: SensitivityReport) -> None:
    by_name = {score.name: score for score in report.scores}
    for block in ("D.0", "U.3"):
        pairs = [score for name, score in by_name.items() if name.startswith(f"{block}.")]
        assert by_name[block].parameters == sum(pair.parameters for pair in pairs)
        assert by_name[block].flops == sum(pair.flops for pair in pairs)


def test_the_table_has_a_row_for_the_baseline_and_every_score(report: SensitivityReport) -> None:
    *_, separator, gates = lines = sensitivity_table(report).splitlines()
    assert (separator, gates[:18]) == ("", "Teacher gates (N =")
    rows = lines[2:-2]
    assert [row.split("|")[1].strip() for row in rows] == ["nothing", *(score.name for score in report.scores)]


def quality(content: float | None, motion: float | None) -> Quality:
    return Quality(clips=2, content_accuracy=content, motion_accuracy=motion, content_distance=1, motion_distance=1)


def score(name: str, judged: Quality) -> UnitScore:
    return UnitScore(name=name, kind="block", depth=2, parameters=1, flops=1, latency_ms=1, quality=judged)


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
    assert teacher_gates(baseline, baseline, scores) == gates


@pytest.mark.parametrize("harmful", ["D.2", "U.1"])
@pytest.mark.parametrize("judged", [quality(0.8, 0.95), quality(0.95, 0.8)])
def test_either_deep_block_and_either_accuracy_is_enough(harmful: str, judged: Quality) -> None:
    harmless = quality(0.95, 0.95)
    scores = [score(name, judged if name == harmful else harmless) for name in ("D.2", "U.1")]
    assert teacher_gates(harmless, harmless, scores)[DEEP]


def test_a_loss_elsewhere_is_no_deep_block_and_without_deep_blocks_there_is_no_such_gate() -> None:
    harmless = quality(0.95, 0.95)
    scores = [score("D.0", quality(0, 0)), score("D.2", harmless), score("U.1", harmless)]
    assert teacher_gates(harmless, harmless, scores)[DEEP] is False
    assert DEEP not in teacher_gates(harmless, harmless, scores[:1])


def test_there_are_no_gates_for_clips_without_labels() -> None:
    assert teacher_gates(quality(None, None), quality(None, None), [score("D.2", quality(None, None))]) == {}
