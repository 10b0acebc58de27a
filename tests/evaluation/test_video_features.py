"""Features of video files: streamed, overlapping, bounded in memory, resumable after a kill."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.ucf_tiny import FRAMES, Projection, save_script, write_avi
from vdmini_core.data.video import Frames, UnreadableVideo, read_clip
from vdmini_core.evaluation import video_features
from vdmini_core.evaluation.extractor import Extractor, load_extractor
from vdmini_core.evaluation.video_features import ClipSpec, decoded, extract_features, read_spec

SPEC = ClipSpec(frames=16, size=32)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for index in range(70):
        write_avi(folder / f"{index:03d}.avi", seed=(index,))
    return folder


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    folder = tmp_path_factory.mktemp("weights")
    return load_extractor(*save_script(folder / "i3d.pt", Projection()), folder)


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def counting(extractor: Extractor) -> tuple[Extractor, list[int]]:
    """The same extractor, and the sizes of the batches it got."""
    sizes: list[int] = []

    def module(videos: torch.Tensor, **call: bool) -> torch.Tensor:
        sizes.append(len(videos))
        return extractor.module(videos, **call)  # type: ignore[no-any-return]

    return Extractor(module, extractor.name, extractor.sha256, extractor.device, extractor.call), sizes


def test_features_are_those_of_all_clips_at_once_in_order(videos: Path, extractor: Extractor, tmp_path: Path) -> None:
    names = names_of(videos)[::-1]
    clips = np.stack([read_clip(videos / name, frames=16, fps=None, size=32) for name in names])
    expected = extractor(torch.from_numpy(clips).permute(0, 4, 1, 2, 3))
    found = extract_features(videos, names, extractor, SPEC, tmp_path, workers=2, batch_size=5)
    assert found.names == tuple(names)
    assert found.skipped == {}
    np.testing.assert_allclose(found.values, expected.numpy(), rtol=1e-12)


def test_unreadable_videos_are_named_and_the_others_kept(videos: Path, extractor: Extractor, tmp_path: Path) -> None:
    for name in names_of(videos)[:6]:
        (tmp_path / name).write_bytes((videos / name).read_bytes())
    (tmp_path / "001.avi").write_bytes((videos / "001.avi").read_bytes()[:900])
    write_avi(tmp_path / "003.avi", seed=(3,), frames=9)
    names = [*names_of(tmp_path), "gone.avi"]
    found = extract_features(tmp_path, names, extractor, SPEC, tmp_path / "cache")
    assert found.names == ("000.avi", "002.avi", "004.avi", "005.avi")
    assert sorted(found.skipped) == ["001.avi", "003.avi", "gone.avi"]
    assert "9 of 16 frames" in found.skipped["003.avi"]
    assert len(found.values) == 4
    with pytest.raises(UnreadableVideo, match=r"none of 1 videos is readable: .*gone\.avi"):
        extract_features(tmp_path, ["gone.avi"], extractor, SPEC, tmp_path / "cache")


def test_a_killed_extraction_goes_on_and_ends_alike(videos: Path, extractor: Extractor, tmp_path: Path) -> None:
    weights = tmp_path / "i3d.pt"
    save_script(weights, Projection())
    script = f"""
import os, signal
from pathlib import Path
from vdmini_core.evaluation.extractor import Extractor, load_extractor
from vdmini_core.evaluation.video_features import ClipSpec, extract_features
real, calls = load_extractor({str(weights)!r}, {extractor.sha256!r}, Path({str(tmp_path)!r})), []
def module(videos, **call):
    calls.append(len(videos))
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real.module(videos, **call)
dying = Extractor(module, real.name, real.sha256, real.device, real.call)
names = sorted(path.name for path in Path({str(videos)!r}).iterdir())
extract_features(Path({str(videos)!r}), names, dying, ClipSpec(frames=16, size=32), Path({str(tmp_path / "cache")!r}))
"""
    assert extractor.sha256 == load_extractor(str(weights), extractor.sha256, tmp_path).sha256
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert killed.returncode == -9
    names = names_of(videos)
    counted, sizes = counting(extractor)
    resumed = extract_features(videos, names, counted, SPEC, tmp_path / "cache")
    assert sum(sizes) == 70 - 32  # the first shard was whole
    whole = extract_features(videos, names, extractor, SPEC, tmp_path / "other cache")
    assert np.array_equal(resumed.values, whole.values)
    assert resumed.names == whole.names
    extract_features(videos, names, counted, SPEC, tmp_path / "cache")
    assert sum(sizes) == 70 - 32


def test_what_features_depend_on_is_extracted_anew(videos: Path, extractor: Extractor, tmp_path: Path) -> None:
    (tmp_path / "a.avi").write_bytes((videos / "000.avi").read_bytes())
    counted, sizes = counting(extractor)
    first = extract_features(tmp_path, ["a.avi"], counted, SPEC, tmp_path / "cache")
    (tmp_path / "a.avi").write_bytes((videos / "001.avi").read_bytes())
    second = extract_features(tmp_path, ["a.avi"], counted, SPEC, tmp_path / "cache")
    extract_features(tmp_path, ["a.avi"], counted, ClipSpec(frames=8, size=32), tmp_path / "cache")
    assert sizes == [1, 1, 1]
    assert not np.array_equal(first.values, second.values)


def test_decoding_goes_on_while_the_extractor_works(
    videos: Path, extractor: Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beyond = threading.Event()

    def read(path: Path, spec: ClipSpec) -> Frames | UnreadableVideo:
        if path.name == "004.avi":
            beyond.set()
        return read_spec(path, spec)

    def module(clips: torch.Tensor, **call: bool) -> torch.Tensor:
        assert beyond.wait(20), "nothing was decoded beyond the first batch"
        return extractor.module(clips, **call)  # type: ignore[no-any-return]

    monkeypatch.setattr(video_features, "read_spec", read)
    waiting = Extractor(module, extractor.name, extractor.sha256, extractor.device, extractor.call)
    extract_features(videos, names_of(videos)[:12], waiting, SPEC, tmp_path, workers=1, batch_size=4)


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_clips_are_decoded_ahead_than_asked_for(
    videos: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(video_features, "read_spec", lambda path, _: read.append(path.name))
    clips = decoded([videos / name for name in names_of(videos)], SPEC, workers, ahead=7)
    for taken, _ in enumerate(clips, 1):
        assert len(read) <= taken + 7
    assert sorted(read) == names_of(videos)


def test_random_starts_are_drawn_once_a_file_and_fit(videos: Path) -> None:
    spec = ClipSpec(frames=5, size=32, start="random", seed=1)
    starts = set()
    for name in names_of(videos)[:20]:
        clip = read_spec(videos / name, spec)
        assert isinstance(clip, np.ndarray)
        assert np.array_equal(clip, read_spec(videos / name, spec))
        every = read_clip(videos / name, frames=FRAMES, fps=None, size=32)
        starts.add(next(s for s in range(FRAMES - 4) if np.array_equal(every[s : s + 5], clip)))
    assert len(starts) > 5
    assert isinstance(read_spec(videos / "000.avi", ClipSpec(frames=FRAMES, size=32, start="random")), np.ndarray)
    assert isinstance(read_spec(videos / "000.avi", ClipSpec(frames=21, size=32, start="random")), UnreadableVideo)
