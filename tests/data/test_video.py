"""Video files: what is written is read, and what is no video is refused by name."""

from pathlib import Path

import av
import numpy as np
import pytest

from vdmini_core.data.synthetic import ALL_LABELS, render_clip
from vdmini_core.data.video import UnreadableVideo, read_clip, write_video


def clip_of(frames: int, size: int = 64) -> np.ndarray:
    return render_clip(ALL_LABELS[0], np.random.default_rng(0), frames=frames, size=size)


def numbered(frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frame i is grey of level 8 * i."""
    levels = (8 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    return np.broadcast_to(levels, (frames, height, width, 3)).copy()


def numbers(clip: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in clip]


@pytest.mark.parametrize(("name", "codec", "crf"), [("a.avi", "mpeg4", 3), ("a.mp4", "libx264", 16)])
def test_a_written_clip_reads_back_with_psnr_above_25_db(tmp_path: Path, name: str, codec: str, crf: int) -> None:
    clip = clip_of(8)
    write_video(tmp_path / name, clip, fps=8, codec=codec, crf=crf)
    again = read_clip(tmp_path / name, frames=8, fps=None, size=64)
    error = ((clip.astype(float) - again.astype(float)) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 25


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(None, [0, 1, 2, 3]), (10, [0, 1, 2, 3]), (5, [0, 2, 4, 6]), (4, [0, 2, 5, 7]), (20, [0, 0, 1, 1])],
)
def test_resampling_takes_the_nearest_earlier_frame(tmp_path: Path, fps: float | None, expected: list[int]) -> None:
    write_video(tmp_path / "a.avi", numbered(12), fps=10, codec="mpeg4", crf=2)
    assert numbers(read_clip(tmp_path / "a.avi", frames=4, fps=fps, size=64)) == expected


def test_the_short_side_is_resized_and_the_centre_cropped(tmp_path: Path) -> None:
    wide = np.zeros((2, 64, 128, 3), np.uint8)
    wide[:, :, 32:96] = 200
    write_video(tmp_path / "a.avi", wide, fps=8, codec="mpeg4", crf=2)
    clip = read_clip(tmp_path / "a.avi", frames=2, fps=None, size=32)
    assert clip.shape == (2, 32, 32, 3)
    assert clip.mean() > 190


def test_a_frame_covers_height_and_width_and_the_centre_is_cropped(tmp_path: Path) -> None:
    tall = np.zeros((2, 128, 64, 3), np.uint8)
    tall[:, 48:80] = 200
    write_video(tmp_path / "a.avi", tall, fps=8, codec="mpeg4", crf=2)
    clip = read_clip(tmp_path / "a.avi", frames=2, fps=None, size=(24, 48))
    assert clip.shape == (2, 24, 48, 3)
    assert clip.mean() > 190


def test_a_file_smaller_than_asked_for_is_enlarged(tmp_path: Path) -> None:
    write_video(tmp_path / "a.avi", numbered(2, 32, 32), fps=8, codec="mpeg4", crf=2)
    assert read_clip(tmp_path / "a.avi", frames=2, fps=None, size=64).shape == (2, 64, 64, 3)


def test_too_short_a_file_is_refused_with_both_counts(tmp_path: Path) -> None:
    write_video(tmp_path / "short.avi", clip_of(3), fps=8, codec="mpeg4", crf=3)
    with pytest.raises(UnreadableVideo, match=r"short\.avi is too short: 3 of 8 frames at 8 fps"):
        read_clip(tmp_path / "short.avi", frames=8, fps=None, size=64)


def test_enough_frames_are_too_few_at_a_lower_rate(tmp_path: Path) -> None:
    write_video(tmp_path / "a.avi", clip_of(8), fps=8, codec="mpeg4", crf=3)
    with pytest.raises(UnreadableVideo, match="4 of 8 frames at 4 fps"):
        read_clip(tmp_path / "a.avi", frames=8, fps=4, size=64)


@pytest.mark.parametrize("content", [b"", b"no video at all" * 50, b"RIFF\x00\x00\x00\x00AVI LIST"])
def test_garbage_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "garbage.avi").write_bytes(content)
    with pytest.raises(UnreadableVideo, match=r"garbage\.avi"):
        read_clip(tmp_path / "garbage.avi", frames=2, fps=None, size=64)


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    write_video(tmp_path / "cut.avi", clip_of(8), fps=8, codec="mpeg4", crf=3)
    whole = (tmp_path / "cut.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableVideo, match=r"cut\.avi"):
        read_clip(tmp_path / "cut.avi", frames=8, fps=None, size=64)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match=r"nowhere\.avi cannot be decoded"):
        read_clip(tmp_path / "nowhere.avi", frames=2, fps=None, size=64)


def test_a_file_of_sound_alone_has_no_video_stream(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mkv"), "w") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(UnreadableVideo, match=r"sound\.mkv has no video stream"):
        read_clip(tmp_path / "sound.mkv", frames=2, fps=None, size=64)
