"""`vdmini vbench generate` and `run` from end to end, with a tiny model and a stand-in for the official code."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from tests.evaluation.vbench.stand_in import calls, set_modes, write_checkout
from tests.text_tiny import write_text_unet
from vdmini_core.artifacts import file_digest

TWO = ("--dimension", "scene", "--dimension", "temporal_flickering", "--steps", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_unet(tmp_path_factory.mktemp("model") / "text")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return write_checkout(tmp_path / "VBench", prompts=1)


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """`vbench run` changes what SIGTERM does to this process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def call(command: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["vbench", command, *map(str, arguments)])


def run(checkout: Path, out: Path, *arguments: object) -> tuple[int, Any]:
    result = call("run", "--checkout", checkout, "--out", out, "--python", sys.executable, "--json", *arguments)
    assert result.exit_code in (0, 1), result.output
    return result.exit_code, json.loads(result.stdout)


def test_shards_resume_and_the_official_scores_are_aggregated(model: Path, checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    making = ("--model", model, "--checkout", checkout, "--out", out, *TWO)
    assert call("generate", *making, "--shard", "0/2").exit_code == 0
    first = {path.name: file_digest(path) for path in (out / "videos").iterdir()}
    assert len(first) == 5
    missing = call("run", "--checkout", checkout, "--out", out, "--python", sys.executable, *TWO[:4])
    assert (missing.exit_code, "5 of 10 videos are missing" in missing.stderr) == (2, True)

    gone = sorted(first)[0]  # as a kill would leave it
    (out / "videos" / gone).unlink()
    code, report = run(checkout, out, "--model", model, *TWO)
    made = {path.name: file_digest(path) for path in (out / "videos").iterdir()}
    assert code == 0
    assert len(set(made.values())) == len(made) == 10
    assert {name: made[name] for name in first} == first
    assert report["scores"]["dimensions"] == {"temporal_flickering": 0.52, "scene": 0.52}
    assert report["scores"]["total"] is None
    assert 0 < report["native_flickering"] <= 1
    protocol = report["protocol"]
    assert (protocol["clips"], protocol["codec"], protocol["crf"], protocol["frames"]) == (10, "libx264", 16, 5)
    assert protocol["sampling"]["steps"] == 1
    assert report == {**json.loads((out / "report.json").read_text())}

    before = calls(checkout)
    code, again = run(checkout, out, "--model", model, *TWO)
    assert (code, calls(checkout), again["scores"]) == (0, before, report["scores"])
    other = call("generate", *making[:-1], "2")
    assert other.exit_code == 2
    assert "was begun with other settings (sampling was" in other.stderr


def test_an_incomplete_evaluation_ends_with_1_and_says_why(model: Path, checkout: Path, tmp_path: Path) -> None:
    set_modes(checkout, scene="silent", temporal_flickering="hang")
    arguments = ("--checkout", checkout, "--out", tmp_path / "out", "--python", sys.executable, "--model", model, *TWO)
    result = call("run", *arguments, "--timeout-minutes", "0.02")
    assert result.exit_code == 1
    assert "scene is incomplete (no result): exit code 0, but no result file" in result.stdout
    assert "temporal_flickering is incomplete (timed out): no end after 1.2 s" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["scores"]["dimensions"] == {}
    assert report["scores"]["complete"] is False


def test_a_stray_file_is_refused_before_the_official_code_starts(model: Path, checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("generate", "--model", model, "--checkout", checkout, "--out", out, *TWO).exit_code == 0
    (out / "videos" / ".DS_Store").write_bytes(b"x")
    result = call("run", "--checkout", checkout, "--out", out, "--python", sys.executable, *TWO[:4])
    assert (result.exit_code, calls(checkout)) == (2, [])
    assert "1 entries belong to no prompt (.DS_Store); move them away" in result.stderr


def test_an_ended_evaluation_leaves_no_official_process_behind(checkout: Path, tmp_path: Path) -> None:
    set_modes(checkout, scene="hang")
    (tmp_path / "out" / "videos").mkdir(parents=True)
    for index in range(5):
        (tmp_path / "out" / "videos" / f"a scene, no. 0-{index}.mp4").write_bytes(b"stands for a video")
    arguments = ("--checkout", checkout, "--out", tmp_path / "out", "--python", sys.executable, "--dimension", "scene")
    command = [sys.executable, "-m", "flows.cli", "vbench", "run", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not calls(checkout) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert calls(checkout) == ["scene"]
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(checkout / "evaluate.py") in (p.info["cmdline"] or [])
    ]


def test_images_begin_the_videos_of_i2v(tiny_pipeline_folder: Path, model: Path, tmp_path: Path) -> None:
    checkout = write_checkout(tmp_path / "VBench", 1, "i2v")
    images = checkout / "vbench2_beta_i2v" / "data" / "crop" / "1-1"
    images.mkdir(parents=True)
    for entry in json.loads((checkout / "vbench2_beta_i2v" / "vbench2_i2v_full_info.json").read_text()):
        Image.new("RGB", (80, 80), (200, 30, 30)).save(images / entry["image_name"])
    wanted = ("--suite", "i2v", "--ratio", "1-1", "--dimension", "i2v_subject", "--steps", "1")
    refused = call("generate", "--model", model, "--checkout", checkout, "--out", tmp_path / "out", *wanted)
    assert (refused.exit_code, "gives a model images, which" in refused.stderr) == (2, True)
    code, report = run(checkout, tmp_path / "out", "--model", tiny_pipeline_folder, *wanted)
    assert (code, report["attempts"]["i2v_subject"]["videos"]) == (0, 5)
    assert report["protocol"]["details"]["ratio"] == "1-1"
