"""VBench's totals against published leaderboard rows, and what is not there is never scored."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdmini_core.evaluation.vbench.scores import DIMENSIONS, RANGES, SUITES, aggregate, canonical, read_scores

ROWS = json.loads((Path(__file__).parents[2] / "data" / "vbench_rows.json").read_text())["rows"]
KLING = next(row for row in ROWS if row["model"] == "Kling")


def fractions(row: dict[str, Any]) -> dict[str, float]:
    return {name: value / 100 for name, value in row["dimensions"].items()}


def write(folder: Path, content: Any) -> Path:
    path = folder / "scores.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("row", ROWS, ids=[row["model"] for row in ROWS])
def test_published_rows_are_reproduced(row: dict[str, Any], tmp_path: Path) -> None:
    result = read_scores(write(tmp_path, fractions(row)))
    assert result.suite == row["suite"]
    assert result.complete
    for name in ("total", "quality", "semantic" if row["suite"] == "t2v" else "i2v"):
        assert getattr(result, name) == pytest.approx(row[name], abs=0.01)


def test_weights_and_counts_are_those_of_the_paper() -> None:
    assert (len(DIMENSIONS["t2v"]), len(DIMENSIONS["i2v"])) == (16, 9)
    sums = {name: sum(group.weights.values()) for groups in SUITES.values() for name, group in groups.items()}
    assert sum(SUITES["t2v"]["quality"].weights.values()) == 6.5
    assert sums == {"quality": 5.5, "semantic": 9, "i2v": pytest.approx(2.1)}


@pytest.mark.parametrize("suite", ["t2v", "i2v"])
def test_scores_at_the_ends_of_their_ranges_are_0_and_100(suite: str) -> None:
    for end, expected in ((0, 0.0), (1, 100.0)):
        result = aggregate({name: RANGES.get(name, (0.0, 1.0))[end] for name in DIMENSIONS[suite]}, suite)
        assert (result.quality, result.total) == (pytest.approx(expected), pytest.approx(expected))


@pytest.mark.parametrize("missing", DIMENSIONS["t2v"])
def test_a_missing_dimension_leaves_its_group_and_the_total_without_a_score(missing: str, tmp_path: Path) -> None:
    scores = {name: value for name, value in fractions(KLING).items() if name != missing}
    result = read_scores(write(tmp_path, scores), "t2v")
    assert (result.missing, result.complete, result.total) == ((missing,), False, None)
    in_quality = missing in SUITES["t2v"]["quality"].weights
    assert (result.quality is None, result.semantic is None) == (in_quality, not in_quality)


@pytest.mark.parametrize("gone", [[], [None, []], None])
def test_a_dimension_without_a_value_is_missing_and_not_zero(gone: Any, tmp_path: Path) -> None:
    result = read_scores(write(tmp_path, {**fractions(KLING), "scene": gone}))
    assert (result.missing, result.total, result.semantic) == (("scene",), None, None)


def test_a_score_of_zero_is_a_score(tmp_path: Path) -> None:
    result = read_scores(write(tmp_path, {**fractions(KLING), "scene": 0.0}))
    assert result.complete
    assert result.total is not None
    assert result.total < KLING["total"]


def test_the_official_result_is_read_as_the_flat_one(tmp_path: Path) -> None:
    videos = [{"video_path": "a-0.mp4", "video_results": 0.5}]
    official: dict[str, list[Any]] = {name: [value, videos] for name, value in fractions(KLING).items()}
    found = read_scores(write(tmp_path, official))
    assert found.model_copy(update={"short": {}}) == aggregate(fractions(KLING), "t2v")
    assert found.short["scene"] == (1, 430)
    official["scene"] = [0.5, videos * 430]
    assert "scene" not in read_scores(write(tmp_path, official)).short


def test_camera_motion_is_read_from_its_own_triple(tmp_path: Path) -> None:
    row = next(row for row in ROWS if row["suite"] == "i2v")
    scores: dict[str, Any] = {name: [value, []] for name, value in fractions(row).items()}
    scores["camera_motion"] = [fractions(row)["camera_motion"], {"pans left": 0.2}, []]
    assert read_scores(write(tmp_path, scores)).i2v == pytest.approx(row["i2v"], abs=0.01)


@pytest.mark.parametrize("spelt", [str.title, str.upper, lambda n: n.replace("_", " "), lambda n: n.replace("_", "-")])
def test_names_may_be_spelt_as_the_leaderboard_does(spelt: Any, tmp_path: Path) -> None:
    assert read_scores(write(tmp_path, {spelt(k): v for k, v in fractions(KLING).items()})).complete


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Video-Image Subject Consistency", "i2v_subject"),
        ("Video-Image Background Consistency", "i2v_background"),
        ("Video-Text Camera Motion", "camera_motion"),
        ("I2VSubject", "i2v_subject"),
        ("i2v subject", "i2v_subject"),
        ("SubjectConsistency", "subject_consistency"),
        (" overall  consistency ", "overall_consistency"),
    ],
)
def test_other_names_of_dimensions_are_known(written: str, name: str) -> None:
    assert canonical(written) == name


def test_percent_is_recognised_and_said(tmp_path: Path) -> None:
    exact = read_scores(write(tmp_path, fractions(KLING)))
    for scores in (KLING["dimensions"], {k: f"{v}%" for k, v in KLING["dimensions"].items()}):
        result = read_scores(write(tmp_path, scores))
        assert result.unit == "percent"
        assert result.total == pytest.approx(exact.total, abs=1e-9)


def test_percent_and_fractions_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {**KLING["dimensions"], "color": 0.899})
    with pytest.raises(ValueError, match=r"mixes percent .* and fractions \(color is 0\.899\)"):
        read_scores(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not whole JSON"),
        ([1, 2], r"expected \{dimension: score\} or VBench's own result, got a list"),
        ({}, "has no score of a VBench dimension; they are called aesthetic_quality"),
        ({"subject_consistancy": 0.9}, "has no score of a VBench dimension"),
        ({"scene": "good"}, "scene is 'good'; expected a score"),
        ({"scene": True}, "scene is True; expected a score"),
        ('{"scene": NaN}', r"scene is nan; expected a finite score \(no video was scored\)"),
        ({"scene": 101.0}, "scene is 101; expected 0 to 1, or 0 to 100 in percent"),
        ({"scene": 0.5, "Scene": 0.5}, "has scene more than once"),
        ({"scene": 0.5, "i2v_subject": 0.9}, "dimensions of both suites; say which one"),
    ],
)
def test_what_is_no_result_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_scores(write(tmp_path, content))


def test_the_suite_can_be_named_and_what_it_does_not_use_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path, {**fractions(KLING), "Total Score": 0.8185, "i2v_subject": 0.9})
    result = read_scores(path, "t2v")
    assert result.complete
    assert result.others == ("Total Score", "i2v_subject")
    with pytest.raises(ValueError, match="no VBench suite 'v2v'; there are t2v, i2v"):
        read_scores(path, "v2v")


@given(st.dictionaries(st.sampled_from(DIMENSIONS["t2v"]), st.floats(0, 1)))
def test_totals_are_there_exactly_when_nothing_is_missing(scores: dict[str, float]) -> None:
    result = aggregate(scores, "t2v")
    assert result.complete == (result.total is not None) == (len(scores) == 16)
    assert set(result.missing) | set(scores) == set(DIMENSIONS["t2v"])
