"""The official process, played by a stand-in that fails in the ways the real one can."""

import os
import re
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.evaluation.vbench.stand_in import calls, set_modes, write_checkout
from tests.tiny import PROVENANCE
from vdmini_core.evaluation.vbench.official import Attempt, Official, evaluate, prompt_means
from vdmini_core.evaluation.vbench.report import VBenchReport, report_text, vbench_report
from vdmini_core.evaluation.vbench.scores import DIMENSIONS
from vdmini_core.evaluation.vbench.suite import FULL_INFO, Suite, read_suite


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return write_checkout(tmp_path / "VBench")


def suite_of(checkout: Path, *dimensions: str) -> Suite:
    suite = read_suite("t2v", checkout / FULL_INFO["t2v"])
    return suite.only(dimensions) if dimensions else suite


def write_videos(folder: Path, suite: Suite) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in suite.videos():
        (folder / name).write_bytes(b"stands for a video")
    return folder


def official(checkout: Path, timeout_s: float = 60.0) -> Official:
    return Official(checkout, sys.executable, timeout_s)


def attempt(tmp_path: Path, checkout: Path, mode: str, timeout_s: float = 60.0) -> Attempt:
    set_modes(checkout, scene=mode)
    suite = suite_of(checkout, "scene")
    videos = write_videos(tmp_path / "videos", suite)
    return evaluate(official(checkout, timeout_s), suite, videos, tmp_path / "official")["scene"]


def report_of(suite: Suite, attempts: dict[str, Attempt]) -> VBenchReport:
    return vbench_report(suite, attempts, None, {}, "p", PROVENANCE)


@pytest.mark.parametrize(
    ("mode", "status", "reason"),
    [
        ("fail", "failed", "exit code 1. Its last words: .*CUDA is not available"),
        ("late failure", "failed", "exit code 3"),
        ("silent", "no result", "exit code 0, but no result file"),
        ("cut", "partial result", "is not whole JSON"),
        ("nan", "partial result", "expected a finite score"),
        ("other dimension", "partial result", "has no score of a VBench dimension"),
        ("some videos", "partial result", "has 14 of 15 videos; missing are 'a scene, no. 2-4.mp4'"),
    ],
)
def test_what_did_not_work_is_said_and_not_scored(
    tmp_path: Path, checkout: Path, mode: str, status: str, reason: str
) -> None:
    found = attempt(tmp_path, checkout, mode)
    assert (found.status, found.score, found.scored) == (status, None, False)
    assert re.search(reason, found.reason, re.DOTALL)
    assert "evaluating scene" in Path(found.log).read_text()
    report = report_of(suite_of(checkout, "scene"), {"scene": found})
    assert report.scores.dimensions == {}
    assert (report.scores.total, report.intervals) == (None, {})
    assert f"scene is incomplete ({status})" in report_text(report)


def test_a_process_that_hangs_is_ended_with_all_it_started(tmp_path: Path, checkout: Path) -> None:
    start = time.monotonic()
    found = attempt(tmp_path, checkout, "hang", timeout_s=1.0)
    assert time.monotonic() - start < 20
    assert (found.status, found.score) == ("timed out", None)
    assert "no end after 1 s; stopped. Its last words: evaluating scene" in found.reason
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(checkout) in " ".join(p.info["cmdline"] or [])]


def test_all_dimensions_scored_are_a_total(tmp_path: Path, checkout: Path) -> None:
    suite = suite_of(checkout)
    videos = write_videos(tmp_path / "videos", suite)
    found = evaluate(official(checkout), suite, videos, tmp_path / "official")
    assert tuple(found) == DIMENSIONS["t2v"]
    assert all(a.scored and a.videos == a.expected == 15 for a in found.values())
    assert found["scene"].score == pytest.approx(0.54)
    report = report_of(suite, found)
    assert report.scores.complete
    assert report.subset is None
    assert set(report.intervals) == {*DIMENSIONS["t2v"], "quality", "semantic", "total"}


def test_one_failure_leaves_the_others_scored_and_is_tried_again_alone(tmp_path: Path, checkout: Path) -> None:
    suite = suite_of(checkout, "scene", "color", "human_action")
    videos = write_videos(tmp_path / "videos", suite)
    set_modes(checkout, color="silent")
    first = evaluate(official(checkout), suite, videos, tmp_path / "official")
    assert [a.scored for a in first.values()] == [True, False, True]
    assert report_of(suite, first).scores.missing == tuple(
        n for n in DIMENSIONS["t2v"] if n not in ("scene", "human_action")
    )
    set_modes(checkout)
    again = evaluate(official(checkout), suite, videos, tmp_path / "official")
    assert calls(checkout) == ["human_action", "color", "scene", "color"]
    assert all(a.scored for a in again.values())


def test_other_videos_are_judged_anew(tmp_path: Path, checkout: Path) -> None:
    attempt(tmp_path, checkout, "good")
    suite = suite_of(checkout, "scene")
    video = tmp_path / "videos" / suite.videos()[0]
    video.write_bytes(b"stands for another video")
    os.utime(video, (1, 1))
    evaluate(official(checkout), suite, tmp_path / "videos", tmp_path / "official")
    assert calls(checkout) == ["scene", "scene"]


def test_color_may_leave_out_videos_without_its_object(tmp_path: Path, checkout: Path) -> None:
    set_modes(checkout, color="some videos")
    suite = suite_of(checkout, "color")
    videos = write_videos(tmp_path / "videos", suite)
    found = evaluate(official(checkout), suite, videos, tmp_path / "official")["color"]
    assert (found.status, found.videos, found.expected) == ("scored", 14, 15)


def test_a_subset_is_marked_and_its_interval_contains_the_score(tmp_path: Path, checkout: Path) -> None:
    suite = suite_of(checkout).subset(2)
    videos = write_videos(tmp_path / "videos", suite)
    report = report_of(suite, evaluate(official(checkout), suite, videos, tmp_path / "official"))
    assert report.subset == 2
    assert report_text(report).startswith("SUBSET: 2 prompts a dimension; not comparable with the leaderboard")
    assert report.scores.total is not None
    low, high = report.intervals["total"]
    assert low < report.scores.total < high


def test_intervals_are_over_prompts(checkout: Path) -> None:
    values = {f"p{index}": (index % 2) * 1.0 for index in range(100)}
    facts = {"status": "scored", "expected": 500, "log": "", "fingerprint": ""}
    judged = Attempt(dimension="scene", score=0.5, per_prompt=values, **facts)
    low, high = report_of(suite_of(checkout, "scene"), {"scene": judged}).intervals["scene"]
    assert (low, high) == (pytest.approx(0.5 - 1.96 * 0.05, abs=0.02), pytest.approx(0.5 + 1.96 * 0.05, abs=0.02))


def test_prompt_means_are_in_the_unit_of_the_score() -> None:
    videos = {"a-b-0.mp4": 60.0, "a-b-1.mp4": 70.0, "c-0.mp4": 50.0}
    assert prompt_means("imaging_quality", videos, ["a-b", "c"]) == pytest.approx({"a-b": 0.65, "c": 0.5})
    assert prompt_means("scene", {"c-0.mp4": float("nan")}, ["c"]) == {}


def test_without_a_checkout_or_a_python_nothing_is_started(tmp_path: Path, checkout: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluate\.py does not exist; expected a checkout"):
        Official(tmp_path, sys.executable, 1).check("t2v")
    with pytest.raises(FileNotFoundError, match="no-python is no program"):
        Official(checkout, "no-python", 1).check("t2v")
