"""Data sets on disk: UCF101's layout, folders of videos, and files that are none."""

from pathlib import Path

import numpy as np
import pytest

from vdmini_core.data.synthetic import ALL_LABELS, render_clip
from vdmini_core.data.ucf101 import EmptyDataset, choose, index_clips, write_synthetic
from vdmini_core.data.video import write_video
from vdmini_core.settings import DataSettings

SETTINGS = DataSettings(frames=2, size=32, groups_per_class=3)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder, SETTINGS)
    return folder


def lines(folder: Path, name: str) -> list[str]:
    return (folder / "ucfTrainTestlist" / f"{name}.txt").read_text().splitlines()


def write_clip(path: Path, frames: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = render_clip(ALL_LABELS[0], np.random.default_rng(0), frames=frames, size=32)
    write_video(path, clip, fps=8, codec="mpeg4", crf=3)


@pytest.mark.parametrize("split", [1, 2])
def test_train_and_test_lists_are_disjoint_and_name_every_file(synthetic: Path, split: int) -> None:
    train = {line.split()[0] for line in lines(synthetic, f"trainlist0{split}")}
    test = set(lines(synthetic, f"testlist0{split}"))
    files = {str(p.relative_to(synthetic / "UCF-101")) for p in (synthetic / "UCF-101").rglob("*.avi")}
    assert not train & test
    assert train | test == files
    assert len(files) == 3 * len(ALL_LABELS)


def test_class_numbers_start_at_one_and_agree_between_the_lists(synthetic: Path) -> None:
    numbers = {name: int(number) for number, name in (line.split() for line in lines(synthetic, "classInd"))}
    assert sorted(numbers.values()) == list(range(1, len(ALL_LABELS) + 1))
    for line in lines(synthetic, "trainlist01"):
        path, number = line.split()
        assert numbers[path.split("/")[0]] == int(number)


def test_the_reader_lists_the_synthetic_set_with_its_labels(synthetic: Path) -> None:
    manifest = index_clips(synthetic, SETTINGS)
    assert manifest.layout == "ucf101"
    assert manifest.skipped == {}
    splits = [clip.split for clip in manifest.clips]
    assert (splits.count("train"), splits.count("test")) == (len(ALL_LABELS), 2 * len(ALL_LABELS))
    by_name = {label.class_name: (label.shape, label.colour, label.motion) for label in ALL_LABELS}
    assert all(clip.label == by_name[clip.class_name] for clip in manifest.clips)


def test_writing_the_synthetic_set_again_gives_the_same_bytes(synthetic: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path, SETTINGS)
    for path in sorted(synthetic.rglob("*.avi"))[::100]:
        assert path.read_bytes() == (tmp_path / path.relative_to(synthetic)).read_bytes()


def test_any_folder_of_videos_is_split_by_file_name(tmp_path: Path) -> None:
    for index in range(10):
        write_clip(tmp_path / f"class{index % 2}" / f"{index}.avi")
    manifest = index_clips(tmp_path, SETTINGS)
    assert manifest.layout == "folder"
    splits = [clip.split for clip in manifest.clips]
    assert (splits.count("train"), splits.count("test")) == (8, 2)
    assert {clip.class_name for clip in manifest.clips} == {"class0", "class1"}
    assert all(clip.label is None for clip in manifest.clips)
    assert index_clips(tmp_path, SETTINGS) == manifest


def test_bad_files_are_skipped_named_and_explained(tmp_path: Path) -> None:
    for index in range(10):
        write_clip(tmp_path / f"{index}.avi")
    write_clip(tmp_path / "short.avi", frames=1)
    (tmp_path / "broken.mp4").write_bytes(b"nothing to see" * 20)
    (tmp_path / "notes.txt").write_text("no video, not even by name")
    manifest = index_clips(tmp_path, SETTINGS)
    assert sorted(manifest.skipped) == ["broken.mp4", "short.avi"]
    assert "1 of 2 frames" in manifest.skipped["short.avi"]
    assert "cannot be decoded" in manifest.skipped["broken.mp4"]
    assert len(manifest.clips) == 10


def test_listed_files_that_are_missing_are_skipped(tmp_path: Path) -> None:
    for index in range(4):
        write_clip(tmp_path / "UCF-101" / "Walk" / f"v_{index}.avi")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("".join(f"Walk/v_{index}.avi 1\n" for index in (0, 1, 2, 9)))
    (lists / "testlist01.txt").write_text("Walk/v_3.avi\n\n")
    manifest = index_clips(tmp_path, SETTINGS)
    assert len(manifest.clips) == 4
    assert list(manifest.skipped) == ["UCF-101/Walk/v_9.avi"]


def test_a_folder_without_usable_clips_is_an_empty_data_set(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing to see" * 20)
    with pytest.raises(EmptyDataset, match=r"1 video files found, 1 skipped \(broken\.mp4: .*cannot be decoded"):
        index_clips(tmp_path, SETTINGS)


def test_a_folder_without_videos_is_an_empty_data_set(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataset, match="0 video files found"):
        index_clips(tmp_path, SETTINGS)


def test_a_missing_folder_is_named_with_what_to_give_instead(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist; give `synthetic` or an existing folder"):
        index_clips(tmp_path / "nowhere", SETTINGS)


def test_chosen_clips_spread_over_classes_and_depend_on_the_seed(synthetic: Path) -> None:
    manifest = index_clips(synthetic, SETTINGS)
    chosen = choose(manifest, "test", len(ALL_LABELS), seed=0)
    assert {clip.class_name for clip in chosen} == {label.class_name for label in ALL_LABELS}
    assert {clip.split for clip in chosen} == {"test"}
    assert choose(manifest, "test", 10, seed=0) == chosen[:10]
    assert choose(manifest, "test", 10, seed=1) != chosen[:10]
    assert len(choose(manifest, "test", 10**6, seed=0)) == 2 * len(ALL_LABELS)


def test_synthetic_clips_are_square(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.size is 32 x 64, but synthetic clips are square; give one side"):
        write_synthetic(tmp_path, DataSettings(frames=2, size=(32, 64)))
