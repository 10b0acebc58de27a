"""The benchmark of feature extraction, in small: both ways give the same features, and the figures fit one another."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.fvd_extraction import app

SMALL = ("--clips", "6", "--memory-clips", "4", "--frames", "8", "--size", "64", "--batch", "3", "--rounds", "2")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    result = CliRunner().invoke(app, [*SMALL, "--json", str(out)])
    assert result.exit_code == 0, result.output
    return {**json.loads(Path(out).read_text()), "printed": result.stdout}


def test_both_ways_have_the_same_features(found: dict[str, Any]) -> None:
    assert found["features_differ"] < 1e-5


def test_times_and_peaks_are_there(found: dict[str, Any]) -> None:
    assert found["plain_ms"] == pytest.approx(found["decode_ms"] + found["extract_ms"])
    assert min(found[name] for name in ("decode_ms", "extract_ms", "streamed_ms", "ratio")) > 0
    assert found["ratio_p10"] <= found["ratio"] <= found["ratio_p90"]
    assert {way: list(peaks) for way, peaks in found["peak_mb"].items()} == {w: ["4"] for w in found["peak_mb"]}
    head, line, row = found["printed"].splitlines()
    assert head.count("|") == line.count("|") == row.count("|")
