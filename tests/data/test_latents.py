"""The encode cache: rows across shards, and batches that depend on the step alone."""

from pathlib import Path

import pytest

from tests.tiny import write_latents
from vdmini_core.data.latents import SHARD_CLIPS, LatentCache, condition_of

CLIPS = SHARD_CLIPS + 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return write_latents(tmp_path_factory.mktemp("latents"), CLIPS, size=4)


def indices(rows: dict[str, object]) -> list[int]:
    return [int(value) for value in rows["latents"][:, 0, 0, 0, 0]]


def test_the_length_counts_the_clips_of_all_shards(cache: LatentCache) -> None:
    assert len(cache) == CLIPS


def test_rows_come_in_the_order_asked_for_across_shard_borders(cache: LatentCache) -> None:
    wanted = [SHARD_CLIPS, 0, SHARD_CLIPS - 1, CLIPS - 1]
    rows = cache.rows(wanted)
    assert indices(rows) == wanted
    assert {len(value) for value in rows.values()} == {4}


def test_batches_follow_one_another_and_the_last_may_be_smaller(cache: LatentCache) -> None:
    batches = list(cache.batches(7, 3, first=SHARD_CLIPS - 4))
    assert [indices(rows) for rows in batches] == [[124, 125, 126], [127, 128, 129], [130]]


def test_more_clips_than_encoded_are_refused(cache: LatentCache) -> None:
    with pytest.raises(ValueError, match=f"{CLIPS + 1} clips wanted, {CLIPS} encoded; raise encode's clip counts"):
        list(cache.batches(2, 1, first=CLIPS - 1))


def test_a_shuffled_batch_is_a_function_of_step_and_seed(cache: LatentCache) -> None:
    batch = cache.shuffled(17, 4, seed=0)
    assert cache.shuffled(17, 4, seed=0)["ids"] == batch["ids"] == indices(batch)
    assert cache.shuffled(18, 4, seed=0)["ids"] != batch["ids"]
    assert cache.shuffled(17, 4, seed=1)["ids"] != batch["ids"]


def test_an_epoch_shows_every_clip_at_most_once_and_the_next_another_order(cache: LatentCache) -> None:
    steps = CLIPS // 7
    first, second = (
        [clip for step in range(start, start + steps) for clip in cache.shuffled(step, 7, seed=0)["ids"]]
        for start in (0, steps)
    )
    assert len(set(first)) == len(first) == CLIPS
    assert sorted(first) == sorted(second)
    assert first != second


def test_a_batch_larger_than_the_set_is_refused(cache: LatentCache) -> None:
    with pytest.raises(ValueError, match=f"batch of 999 from {CLIPS} encoded clips; lower the batch size"):
        cache.shuffled(0, 999, seed=0)


def test_the_condition_loses_its_prefix_and_nothing_else_comes_with_it(cache: LatentCache) -> None:
    assert sorted(condition_of(cache.rows([0]))) == ["added_time_ids", "image_embedding", "image_latents"]


def test_a_missing_cache_says_to_run_the_stage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"latents\.json does not exist; run the stage that writes it"):
        LatentCache(tmp_path, "train")
