"""The benchmark of whole clips on the zoo's small teachers: its figures fit one another, its ratios are earned."""

import json
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import nn
from typer.testing import CliRunner

from benchmarks.end_to_end import app
from tests.tiny import new_inputs, new_unet
from vdmini_core.artifacts import Latency
from vdmini_core.evaluation.costs import count_call, count_costs, speedup
from vdmini_core.evaluation.stage_times import STAGES

COMMAND = ["zoo:i2v-shapes", "--device", "cpu", "--precision", "fp32", "--frames", "4", "--steps", "2", "--compile"]


def run(tmp_path_factory: pytest.TempPathFactory, runs: int) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    asked: list[int] = []
    called: list[int] = []
    forward = UNetSpatioTemporalConditionModel.forward

    def counted(model: UNetSpatioTemporalConditionModel, sample: Any, *rest: Any, **named: Any) -> Any:
        called.extend([id(model)] if sample.device.type == "cpu" else [])
        return forward(model, sample, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNetSpatioTemporalConditionModel, "forward", counted)
        patch.setattr(nn.Module, "compile", lambda model, **options: asked.append(id(model)))
        result = CliRunner().invoke(app, [*COMMAND, "--runs", str(runs), "--warmup", "0", "--json", str(out)])
    assert result.exit_code == 0, result.output
    return {**json.loads(out.read_text()), "printed": result.stdout, "compiled": asked, "called": called}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory, 2)


def test_parts_add_up_to_the_whole_and_two_steps_take_two_calls(found: dict[str, Any]) -> None:
    for mode in found["modes"]:
        for side in ("teacher", "student"):
            stages = mode["stages"][side]
            assert list(stages) == list(STAGES)
            medians = [stages[name]["median_ms"] for name in STAGES]
            assert sum(medians[:-1]) == pytest.approx(medians[-1])  # of two runs the median is the mean
            assert min(medians) > 0
    # A side is called once alone and twice in a clip: in each of two runs, and first of all.
    assert len(found["called"]) == len(found["modes"]) * 2 * 3 * (1 + 2)


def test_from_few_runs_no_ratio_is_printed_or_kept(found: dict[str, Any]) -> None:
    for mode in found["modes"]:
        assert (mode["step_speedup"], mode["end_to_end_speedup"], mode["eta"]) == (None, None, None)
    assert found["printed"].count("- (needs 30 runs)") == 3 * len(found["modes"])


def test_thirty_runs_earn_a_ratio_and_one_fewer_on_either_side_does_not() -> None:
    many, few = (Latency(median_ms=ms, p10_ms=1, p90_ms=1, runs=runs) for ms, runs in ((3.0, 30), (2.0, 29)))
    fast = many.model_copy(update={"median_ms": 2.0})
    assert speedup(many, fast) == 1.5
    assert speedup(many, few) is speedup(few, many) is None


def test_the_result_says_what_every_part_is(found: dict[str, Any]) -> None:
    assert set(found["parameters"]) == {"vae", "image_encoder", "teacher", "student"}
    assert set(found["flops"]) == {"encoder", "teacher", "student", "vae_decode"}
    assert min(found["flops"].values()) > 0
    assert found["flop_ratio"] == found["flops"]["student"] / found["flops"]["teacher"] < 1
    assert (found["clip_shape"], found["steps"]) == ([4, 64, 64], 2)
    assert found["student"].startswith("paper without ")
    assert [mode["mode"] for mode in found["modes"]] == ["eager", "compiled"]
    assert len(set(found["compiled"])) == 2
    head, line, *rows = found["printed"].splitlines()[:4]
    assert {text.count("|") for text in (head, line, *rows)} == {head.count("|")}


def test_flops_of_a_call_include_attention_as_on_the_meta_device() -> None:
    denoiser, (latents, condition) = new_unet(), new_inputs()
    assert (
        count_call(lambda: denoiser(latents, torch.ones(1), condition))
        == count_costs(denoiser, latents, condition).flops
    )
    query = torch.rand(1, 2, 5, 8)
    attention = 2 * 2 * 2 * 5 * 5 * 8  # two products, two heads
    assert count_call(lambda: nn.functional.scaled_dot_product_attention(query, query, query)) == attention


def test_a_model_without_a_device_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["zoo:i2v-shapes"])
    assert result.exit_code == 2
    assert "no CUDA device here" in result.stderr
