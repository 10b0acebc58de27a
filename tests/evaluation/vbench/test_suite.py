"""VBench's prompts, the names of their videos, and what is wrong with a folder of them."""

import json
from pathlib import Path

import pytest

from tests.evaluation.vbench.stand_in import write_checkout
from vdmini_core.evaluation.generation import shard_of
from vdmini_core.evaluation.vbench.scores import DIMENSIONS
from vdmini_core.evaluation.vbench.suite import (
    FULL_INFO,
    Suite,
    check_layout,
    layout_text,
    orders_of,
    read_suite,
    video_name,
)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return read_suite("t2v", write_checkout(tmp_path / "VBench") / FULL_INFO["t2v"])


def fill(folder: Path, suite: Suite) -> None:
    folder.mkdir()
    for name in suite.videos():
        (folder / name).write_bytes(b"x")


def test_every_prompt_asks_for_five_videos_by_name(suite: Suite) -> None:
    assert len(suite.videos()) == 5 * len(suite.prompts()) == 5 * 12 * 3
    assert suite.videos()[:5] == [f"a subject, no. 0-{index}.mp4" for index in range(5)]
    assert len(set(suite.videos())) == len(suite.videos())


def test_a_prompt_listed_twice_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    entries = [{"prompt_en": "a", "dimension": ["scene"]}, {"prompt_en": "a", "dimension": ["color"]}]
    path.write_text(json.dumps(entries))
    suite = read_suite("t2v", path)
    assert (suite.prompts(), suite.dimensions()) == (["a"], ["color", "scene"])
    assert suite.only(["color"]).entries == (entries[1],)


def test_seeds_differ_between_videos_and_depend_on_nothing_else(suite: Suite) -> None:
    orders = orders_of(suite, 0)
    assert len({order.seed for order in orders}) == len(orders)
    assert all(order in orders for order in orders_of(suite.subset(1), 0))
    assert {o.seed for o in orders_of(suite, 1)}.isdisjoint({o.seed for o in orders})


def test_shards_are_disjoint_and_cover_all(suite: Suite) -> None:
    orders = orders_of(suite, 0)
    shards = [shard_of(orders, f"{index}/4") for index in range(4)]
    assert sorted(o.name for shard in shards for o in shard) == sorted(o.name for o in orders)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for wrong in ("4/4", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="a shard is given as i/n"):
            shard_of(orders, wrong)


def test_a_subset_has_n_prompts_of_every_dimension_and_shares_them(suite: Suite) -> None:
    subset = suite.subset(2, seed=3)
    assert {len(subset.prompts(name)) for name in DIMENSIONS["t2v"]} == {2}
    assert subset.prompts("subject_consistency") == subset.prompts("dynamic_degree")
    assert len(subset.prompts()) == 2 * 12
    assert subset.per_dimension == 2
    assert set(suite.subset(1, seed=3).prompts()) < set(subset.prompts())
    assert suite.subset(2, seed=4).prompts() != subset.prompts()


def test_a_complete_folder_is_complete_and_may_hold_the_whole_suite(suite: Suite, tmp_path: Path) -> None:
    fill(tmp_path / "videos", suite)
    assert check_layout(tmp_path / "videos", suite, suite).complete
    assert check_layout(tmp_path / "videos", suite.subset(1), suite).complete


@pytest.mark.parametrize("stray", [".DS_Store", "a subject, no. 0-5.mp4", "generation.json", "a subject, no. 0-0.gif"])
def test_stray_files_are_named(suite: Suite, tmp_path: Path, stray: str) -> None:
    fill(tmp_path / "videos", suite)
    (tmp_path / "videos" / stray).write_bytes(b"x")
    layout = check_layout(tmp_path / "videos", suite, suite)
    assert (layout.stray, layout.complete) == ((stray,), False)
    assert f"1 entries belong to no prompt ({stray}); move them away" in layout_text(layout, tmp_path)


def test_missing_and_empty_videos_are_named(suite: Suite, tmp_path: Path) -> None:
    fill(tmp_path / "videos", suite)
    first, second = suite.videos()[:2]
    (tmp_path / "videos" / first).unlink()
    (tmp_path / "videos" / second).write_bytes(b"")
    layout = check_layout(tmp_path / "videos", suite, suite)
    assert layout.missing == (first, second)
    assert f"2 of 180 videos are missing ({first}, {second})" in layout_text(layout, tmp_path)
    assert len(check_layout(tmp_path / "nowhere", suite, suite).missing) == 180


def test_unusable_prompts_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be a file's name"):
        video_name("a/b", 0)
    path = tmp_path / "info.json"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is no list of prompts"):
        read_suite("t2v", path)
    with pytest.raises(FileNotFoundError, match="expected a checkout"):
        read_suite("t2v", tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="no VBench suite 'x2v'"):
        read_suite("x2v", path)


def test_an_unknown_dimension_is_refused_with_those_there_are(suite: Suite) -> None:
    with pytest.raises(ValueError, match="'colour' is no dimension of VBench t2v; there are subject_consistency"):
        suite.only(["colour"])


def test_images_belong_to_the_prompts_of_i2v(tmp_path: Path) -> None:
    suite = read_suite("i2v", write_checkout(tmp_path / "VBench", 1, "i2v") / FULL_INFO["i2v"])
    with pytest.raises(FileNotFoundError, match=r"download_data\.sh in the checkout fetches the images"):
        orders_of(suite, 0, tmp_path)
    for prompt in suite.prompts():
        (tmp_path / f"{prompt}.jpg").write_bytes(b"x")
    order = orders_of(suite, 0, tmp_path)[0]
    assert order.source == tmp_path / f"{order.prompt}.jpg"
