"""The latency benchmark on a small teacher: its figures fit one another, and errors say what there is."""

import json
import re
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks.denoiser_latency import app

SMALL = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run on the zoo's teacher, with what it printed and which networks it compiled (without compiling them)."""
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    command = ["zoo:i2v-shapes", *SMALL, "--compile", "--units", "--runs", "2", "--warmup", "0", "--json", str(out)]
    asked: list[tuple[int, dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda model, **options: asked.append((id(model), options)))
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return {**json.loads(out.read_text()), "printed": result.stdout, "compiled": asked}


def test_the_figures_are_what_the_measured_ones_give(found: dict[str, Any]) -> None:
    assert found["flop_ratio"] == pytest.approx(found["flops"]["student"] / found["flops"]["teacher"])
    for mode in found["modes"]:
        teacher, student = (mode["latency"][name] for name in ("teacher", "student"))
        assert teacher["runs"] == student["runs"] == 2
        assert 0 < teacher["p10_ms"] <= teacher["median_ms"] <= teacher["p90_ms"]
        assert mode["speedup"] == pytest.approx(teacher["median_ms"] / student["median_ms"])
        assert mode["eta"] == pytest.approx(mode["speedup"] * found["flop_ratio"])
        rates = mode["teraflops_per_s"]
        assert mode["eta"] == pytest.approx(rates["student"] / rates["teacher"])
        assert rates["teacher"] == pytest.approx(found["flops"]["teacher"] / 1e12 / (teacher["median_ms"] / 1e3))


def test_the_result_says_what_was_timed_and_where(found: dict[str, Any]) -> None:
    assert found["plan"]["method"] == "paper"
    assert {"M", "D.0.1", "U.3.1"} <= set(found["plan"]["removed"])
    assert found["parameters"]["student"] < found["parameters"]["teacher"]
    assert (found["denoiser"], found["dtype"], found["eta_target"]) == ("UNetSpatioTemporalConditionModel", "fp32", 0.9)
    assert found["device"] == "CPU"
    assert {"torch", "diffusers"} <= set(found["provenance"]["software"])
    assert found["provenance"]["commit"]
    assert {mode["peak_memory_bytes"] for mode in found["modes"]} == {None}


def test_both_networks_are_compiled_once_and_that_is_timed_apart(found: dict[str, Any]) -> None:
    assert [mode["mode"] for mode in found["modes"]] == ["eager", "compiled"]
    assert len({network for network, _ in found["compiled"]}) == len(found["compiled"]) == 2
    assert all(options == {"dynamic": False} for _, options in found["compiled"])
    eager, compiled = (mode["compile_s"] for mode in found["modes"])
    assert eager is None
    assert min(compiled[name] for name in ("teacher", "student")) > 0


def test_the_recorded_command_is_the_one_that_was_given(found: dict[str, Any]) -> None:
    expected = "zoo:i2v-shapes --device cpu --dtype fp32 --compile --units --runs 2 --warmup 0"
    assert found["command"] == f"python benchmarks/denoiser_latency.py {expected}"


def test_units_of_the_teacher_have_times_and_flops(found: dict[str, Any]) -> None:
    units = found["teacher_units"]
    assert {unit["name"] for unit in units if unit["removed"]} == set(found["plan"]["removed"])
    assert all(unit["latency_ms"] > 0 and unit["flops"] > 0 for unit in units)
    assert "of all units' FLOPs and" in found["printed"]


def test_every_mode_is_a_row_of_the_table(found: dict[str, Any]) -> None:
    head, line, *rows = found["printed"].splitlines()[:4]
    assert {text.count("|") for text in (head, line, *rows)} == {head.count("|")}
    for row, mode in zip(rows, found["modes"], strict=True):
        assert f"| fp32 | {mode['mode']} |" in row
        assert f"| {mode['eta']:.3f} (0.90) |" in row


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["svd-tx", *SMALL], r"svd-tx' is no folder.*svd-xt.*zoo:i2v-shapes.*the recipes are cogvideox-2b"),
        (["zoo:none", *SMALL], "the zoo has zoo:i2v-shapes"),
        (["svd-xt"], "no CUDA device here; try a small model, such as zoo:i2v-shapes --device cpu"),
        (["zoo:i2v-shapes", *SMALL, "--frames", "4"], "--frames, --height and --width together"),
        (["i2v-shapes", *SMALL, "--height", "64"], "give --height and --width together"),
        (["i2v-shapes", *SMALL, "--height", "61", "--width", "64"], "61 x 64 pixels are no multiples of 4"),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(command: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert re.search(told, result.stderr)
