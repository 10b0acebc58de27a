"""temporal_flickering against the official definition, written out a second time, on encoded clips."""

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from vdmini_core.data.synthetic import ALL_LABELS, render_clip
from vdmini_core.data.video import UnreadableVideo, write_video
from vdmini_core.evaluation.vbench.flicker import flickering_score, temporal_flickering


def official(path: Path) -> float:
    """All frames in memory, float32 differences, a mean of each pair's mean: vbench/temporal_flickering.py."""
    video, frames = cv2.VideoCapture(str(path)), []
    while (read := video.read())[0]:
        frames.append(np.array(read[1], dtype=np.float32))
    pairs = [np.mean(cv2.absdiff(a, b)) for a, b in pairwise(frames)]
    return float((255.0 - np.mean(np.array(pairs)).item()) / 255.0)


def clip(label: int, frames: int = 8, size: int = 64) -> np.ndarray:
    return render_clip(ALL_LABELS[label], np.random.default_rng(label), frames=frames, size=size)


@pytest.mark.parametrize(
    ("name", "codec", "crf"), [("a.mp4", "libx264", 16), ("b.mp4", "libx264", 30), ("c.avi", "mpeg4", 3)]
)
@pytest.mark.parametrize("label", [0, 7, 20])
def test_encoded_clips_are_scored_as_by_the_official_code(
    tmp_path: Path, name: str, codec: str, crf: int, label: int
) -> None:
    write_video(tmp_path / name, clip(label), fps=8, codec=codec, crf=crf)
    score = flickering_score(tmp_path / name)
    assert score == pytest.approx(official(tmp_path / name), abs=1e-6)
    assert 0.5 < score < 1


def test_large_noisy_frames_are_scored_as_by_the_official_code(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 240, 320, 3), dtype=np.uint8)
    write_video(tmp_path / "noise.mp4", noise, fps=8, codec="libx264", crf=10)
    assert flickering_score(tmp_path / "noise.mp4") == pytest.approx(official(tmp_path / "noise.mp4"), abs=1e-6)


def test_a_frozen_video_scores_one_and_a_known_flicker_its_amplitude(tmp_path: Path) -> None:
    grey = np.full((6, 64, 64, 3), 100, np.uint8)
    write_video(tmp_path / "frozen.mp4", grey, fps=8, codec="libx264", crf=0)
    grey[1::2] += 51  # a fifth of the range
    write_video(tmp_path / "flicker.mp4", grey, fps=8, codec="libx264", crf=0)
    assert flickering_score(tmp_path / "frozen.mp4") == 1
    assert flickering_score(tmp_path / "flicker.mp4") == pytest.approx(0.8, abs=0.01)


def test_what_cannot_be_judged_is_named_and_left_out_of_the_mean(tmp_path: Path) -> None:
    for index in range(2):
        write_video(tmp_path / f"{index}.mp4", clip(index), fps=8, codec="libx264", crf=16)
    write_video(tmp_path / "still.mp4", clip(0, frames=1), fps=8, codec="libx264", crf=16)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    found = temporal_flickering(sorted(tmp_path.glob("*.mp4")))
    assert len(found.videos) == 2
    assert found.score == pytest.approx(np.mean(list(found.videos.values())))
    reasons = {Path(name).name: reason for name, reason in found.skipped.items()}
    assert "has one frame" in reasons["still.mp4"]
    assert "has no frame" in reasons["broken.mp4"]


def test_no_judged_video_is_no_score(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert temporal_flickering([tmp_path / "broken.mp4"]).score is None
    with pytest.raises(UnreadableVideo, match="no frame; flickering is measured between two"):
        flickering_score(tmp_path / "broken.mp4")
