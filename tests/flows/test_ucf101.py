"""`vdmini fvd`, `is`, `ucf101` and `compare` on a small data set in UCF101's layout."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app
from tests.evaluation.ucf_tiny import Classifier, Projection, save_script, write_ucf101
from vdmini_core.artifacts import file_digest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ucf101(tmp_path_factory.mktemp("ucf"), groups=4, clips=1)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def answer(*arguments: object) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_videos_from_first_frames_are_made_judged_and_compared(
    data: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    (data / "UCF-101" / "YoYo" / "v_YoYo_g01_c01.avi").rename(tmp_path / "kept.avi")
    making = ("ucf101", data, "--model", tiny_pipeline_folder, "--out", tmp_path / "made", "--steps", "1")
    try:
        first = call(*making, "--shard", "0/2")
        second = call(*making)
    finally:
        (tmp_path / "kept.avi").rename(data / "UCF-101" / "YoYo" / "v_YoYo_g01_c01.avi")
    assert (first.exit_code, second.exit_code) == (0, 0)
    videos = {p.relative_to(tmp_path / "made" / "videos"): file_digest(p) for p in tmp_path.rglob("*.mp4")}
    assert len(videos) == len(set(videos.values())) == 5
    assert "v_YoYo_g01_c01.avi cannot be decoded" in second.stderr
    assert Path("UCF-101/BabyCrawling/v_BabyCrawling_g02_c01.mp4") in videos

    path, sha256 = save_script(tmp_path / "i3d.pt", Projection())
    judging = ("--extractor", path, "--sha256", sha256, "--size", 32, "--cache", tmp_path / "cache", "--frames", 4)
    arguments = ("fvd", data, tmp_path / "made", *judging, "--part", "test")
    found = answer(*arguments, "--out", tmp_path / "a.json")
    assert found["clips"] == 5
    assert found["protocol"]["sampling"]["steps"] == 1
    assert (found["protocol"]["codec"], found["protocol"]["crf"]) == ("h264", 16)
    assert json.loads((tmp_path / "a.json").read_text())["fvd"] == found["fvd"]
    assert "FVD" in call(*arguments).stdout

    again = answer(*arguments[:-2], "--part", "train", "--out", tmp_path / "b.json")
    refused = call("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert refused.exit_code == 2
    assert "name what may differ: --despite reference" in refused.stderr
    compared = answer("compare", tmp_path / "a.json", tmp_path / "b.json", "--despite", "reference")
    assert {row["name"]: row["second"] for row in compared["numbers"]}["fvd"] == again["fvd"]
    text = call("compare", tmp_path / "a.json", tmp_path / "b.json", "--despite", "reference")
    assert "DIFFERENT PROTOCOLS: reference" in text.stderr


def test_the_inception_score_of_a_folder(data: Path, tmp_path: Path) -> None:
    path, sha256 = save_script(tmp_path / "c3d.pt", Classifier())
    judging = ("--extractor", path, "--sha256", sha256, "--size", 32, "--cache", tmp_path / "cache")
    found = answer("is", data / "UCF-101", *judging, "--splits", 3)
    assert found["inception_score"] > 1
    assert (found["clips"], len(found["splits"]["values"])) == (12, 3)
    assert "inception score" in call("is", data / "UCF-101", *judging, "--splits", 3).stdout


def test_weights_with_another_digest_are_refused(data: Path, tmp_path: Path) -> None:
    path, _ = save_script(tmp_path / "i3d.pt", Projection())
    result = call("fvd", data, data, "--extractor", path, "--sha256", "0" * 64, "--cache", tmp_path)
    assert (result.exit_code, "it was not loaded" in result.stderr) == (2, True)
