"""The benchmark of predicted latencies on a small teacher: different plans, and errors of what was predicted."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.plan_latency import app


def test_every_plan_is_predicted_built_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [
        "zoo:i2v-shapes",
        "--plans",
        "3",
        "--runs",
        "1",
        "--builds",
        "2",
        "--warmup",
        "0",
        "--smallest",
        "0.5",
        "--json",
        str(out),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    checks = found["checks"]
    assert len({tuple(check["removed"]) for check in checks}) == 3
    for check in checks:
        assert 0 < check["predicted"] <= 0.95
        assert check["latency"]["runs"] == 2
        assert check["measured"] == pytest.approx(check["latency"]["median_ms"] / found["teacher"]["median_ms"])
        assert check["error"] == pytest.approx(check["predicted"] / check["measured"] - 1)
    assert found["largest_error"] == max(abs(check["error"]) for check in checks)
    assert f"{found['largest_error']:.3f} |" in result.stdout


def test_without_a_cuda_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["--device", "cuda"])
    assert result.exit_code == 2
    assert "there is no CUDA device here; use --device cpu" in result.stderr
