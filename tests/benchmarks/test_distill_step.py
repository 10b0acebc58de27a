"""The benchmark of a training step, on the small teacher: its figures fit one another."""

import json
import math
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.distill_step import PARTS, Sample, app, ratio

SMALL = ["--device", "cpu", "--batch", "1", "--runs", "1", "--warmup", "0"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    result = CliRunner().invoke(app, ["zoo:i2v-shapes", *SMALL, "--json", str(out)])
    assert result.exit_code == 0, result.output
    return {**json.loads(out.read_text()), "printed": result.stdout}


def test_the_ratios_are_those_of_the_times(found: dict[str, Any]) -> None:
    times = {name: timing["wall"]["median_ms"] for name, timing in found["timings"].items()}
    assert set(times) == {"step", *PARTS, "plain"}
    assert all(time > 0 for time in times.values())
    assert found["step_ratio"]["wall"] == pytest.approx(times["step"] / sum(times[name] for name in PARTS))
    assert found["plain_ratio"]["wall"] == pytest.approx(times["plain"] / times["step"])
    assert {timing["wall"]["runs"] for timing in found["timings"].values()} == {1}


def test_the_result_says_what_was_timed(found: dict[str, Any]) -> None:
    expected = (
        "python -m benchmarks.distill_step zoo:i2v-shapes --device cpu --precision bf16 --batch 1 --runs 1 --warmup 0"
    )
    assert found["command"] == expected
    assert found["provenance"]["params"]["mca_weight"] == 1.0
    assert (found["device"], found["batch"], found["target"]) == ("CPU", 1, 1.05)
    head, line, row = found["printed"].splitlines()
    assert head.count("|") == line.count("|") == row.count("|")


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_times() -> None:
    samples = {
        "step": [Sample(2.0, 4.0, None), Sample(30.0, 4.0, None), Sample(4.0, 4.0, None)],
        "teacher": [Sample(1.0, 1.0, None), Sample(10.0, 1.0, None), Sample(1.0, 1.0, None)],
        "heads": [Sample(1.0, 1.0, None), Sample(5.0, 3.0, None), Sample(0.0, 3.0, None)],
    }
    assert ratio(samples, ("step",), ("teacher", "heads")) == {"wall": 2.0, "cpu": 1.0}
    assert math.isclose(ratio(samples, ("step",), ("teacher",))["wall"], 3.0)


def test_without_a_device_it_says_what_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["svd-xt"])
    assert result.exit_code == 2
    assert "try zoo:i2v-shapes --device cpu" in result.stderr
