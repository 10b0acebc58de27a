"""The commands that measure files: what they print, and what they say of files that are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli import app
from tests.evaluation.test_frechet import CASES, features
from vdmini_core.data.video import write_video

ROWS = json.loads((Path(__file__).parents[1] / "data" / "vbench_rows.json").read_text())["rows"]


def answer(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("ddof", [0, 1])
def test_frechet_prints_the_distance_of_two_files(tmp_path: Path, ddof: int) -> None:
    for name, values in zip("ab", features(CASES[-1]), strict=True):
        np.save(tmp_path / f"{name}.npy", values)
    found = answer("frechet", tmp_path / "a.npy", tmp_path / "b.npy", "--ddof", ddof)
    assert found["distance"] == pytest.approx(CASES[-1][f"ddof{ddof}"], rel=1e-6)
    assert (found["first"], found["width"], found["ddof"]) == (500, 8, ddof)
    assert answer("frechet", tmp_path / "a.npy", tmp_path / "a.npy")["distance"] < 1e-6


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: path.write_text("1 2 3"), "is no .npy file of numbers"),
        (lambda path: np.save(path, np.zeros(3)), "expected numbers [N, D] in a .npy file, got float64 (3,)"),
        (lambda path: np.save(path, np.array([["a"]])), "expected numbers [N, D]"),
        (lambda path: np.save(path, np.array([[{}]], dtype=object), allow_pickle=True), "is no .npy file of numbers"),
        (lambda path: None, "does not exist; expected features"),
    ],
)
def test_files_without_features_are_refused(tmp_path: Path, write: Any, told: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 3)))
    write(tmp_path / "b.npy")
    result = CliRunner().invoke(app, ["frechet", str(tmp_path / "a.npy"), str(tmp_path / "b.npy")])
    assert result.exit_code == 2
    assert told in result.stderr


def test_vbench_score_prints_groups_total_and_what_is_missing(tmp_path: Path) -> None:
    row = ROWS[0]
    scores = {name: value / 100 for name, value in row["dimensions"].items()}
    (tmp_path / "whole.json").write_text(json.dumps(scores))
    found = answer("vbench", "score", tmp_path / "whole.json")
    assert found["total"] == pytest.approx(row["total"], abs=0.01)
    assert (found["complete"], found["missing"]) == (True, [])
    del scores["scene"]
    (tmp_path / "part.json").write_text(json.dumps(scores))
    found = answer("vbench", "score", tmp_path / "part.json")
    assert (found["total"], found["semantic"], found["missing"]) == (None, None, ["scene"])
    text = CliRunner().invoke(app, ["vbench", "score", str(tmp_path / "part.json")]).stdout
    assert "total    incomplete" in text
    assert "missing  scene" in text


def test_vbench_score_explains_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"scene": [0.5')
    result = CliRunner().invoke(app, ["vbench", "score", str(tmp_path / "cut.json")])
    assert (result.exit_code, "is not whole JSON" in result.stderr) == (2, True)


def test_vbench_flicker_prints_every_video_and_the_mean(tmp_path: Path) -> None:
    for name, step in (("still", 0), ("fast", 20)):
        clip = (100 + step * np.arange(4, dtype=np.uint8))[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
        write_video(tmp_path / f"{name}.mp4", clip, fps=8, codec="libx264", crf=0)
    found = answer("vbench", "flicker", tmp_path / "still.mp4", tmp_path / "fast.mp4")
    still, fast = found["videos"].values()
    assert (still, fast) == (1, pytest.approx(1 - 20 / 255, abs=0.01))
    assert found["score"] == pytest.approx((still + fast) / 2)
