"""The benchmark of decoders on a small model: rows, and no ratio from too few runs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.decoder_latency import app


def test_both_decoders_are_built_timed_and_predicted(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    size = ["--frames", "2", "--height", "16", "--width", "16"]
    command = ["zoo:i2v-shapes", "--device", "cpu", "--dtype", "fp32", *size, "--runs", "1", "--warmup", "0"]
    result = CliRunner().invoke(app, [*command, "--denoiser", "--predict", "--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    (mode,) = found["modes"]
    assert set(mode["decode"]) == set(mode["step"]) == {"original", "compressed"}
    assert mode["decode_speedup"] is mode["step_speedup"] is None  # of one run
    assert found["plan"]["removed"] == ["M", "U.2.1"]
    measured = mode["decode"]["compressed"]["median_ms"] / mode["decode"]["original"]["median_ms"]
    assert found["prediction_error"] == pytest.approx(found["predicted"] / measured - 1)
    assert "| eager | 650,600 -> " in result.stdout


def test_without_a_cuda_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["svd-xt"])
    assert result.exit_code == 2
    assert "there is no CUDA device here" in result.stderr
