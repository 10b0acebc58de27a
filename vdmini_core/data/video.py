"""Reads and writes encoded video files through PyAV; the only place that knows about codecs."""

from pathlib import Path
from typing import BinaryIO

import av
import cv2
import numpy as np
import numpy.typing as npt

from vdmini_core.settings import height_and_width

Frames = npt.NDArray[np.uint8]

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".gif")


class UnreadableVideo(ValueError):
    """The file is no video, is damaged, or is shorter than the clip asked for."""


def read_clip(
    source: Path | BinaryIO, *, frames: int, fps: float | None, size: int | tuple[int, int], start: int = 0
) -> Frames:
    """Decode `frames` frames at `fps` (None: the file's own) from the `start`-th on, uint8 [T, H, W, 3].

    Frames are taken at the nearest earlier source frame of each output time. They are resized (area
    averaging when shrinking) just to cover `size`, a side or height and width; then the centre is cropped.
    """
    sides = height_and_width(size)
    name = str(source) if isinstance(source, Path) else "video stream"
    try:
        with av.open(source if not isinstance(source, Path) else str(source)) as container:
            if not container.streams.video:
                raise UnreadableVideo(f"{name} has no video stream")
            stream = container.streams.video[0]
            own_fps = float(stream.average_rate or stream.guessed_rate or 0)
            if own_fps <= 0:
                raise UnreadableVideo(f"{name} does not state its frame rate")
            step = own_fps / (fps or own_fps)
            wanted = [int(index * step + 1e-6) for index in range(start, start + frames)]
            picked: list[Frames] = []
            for index, frame in enumerate(container.decode(stream)):
                while len(picked) < frames and wanted[len(picked)] == index:
                    picked.append(_fit(frame.to_ndarray(format="rgb24"), *sides))
                if len(picked) == frames:
                    break
    except (av.FFmpegError, OSError) as error:
        raise UnreadableVideo(f"{name} cannot be decoded: {error}") from error
    if len(picked) < frames:
        place = f" from frame {start} on" if start else ""
        raise UnreadableVideo(f"{name} is too short: {len(picked)} of {frames} frames at {fps or own_fps:g} fps{place}")
    return np.stack(picked)


def frame_count(path: Path, *, fps: float | None) -> int:
    """Frames of a file at `fps` (None: its own), by its header where that tells, else by decoding it."""
    count, own_fps = frames_and_fps(path)
    return int((count - 1) * fps / own_fps + 1e-6) + 1 if fps and own_fps and count else count


def frames_and_fps(path: Path) -> tuple[int, float]:
    """A file's frames and frames a second; the latter 0 where it does not state them."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableVideo(f"{path} has no video stream")
            stream = container.streams.video[0]
            own_fps = float(stream.average_rate or stream.guessed_rate or 0)
            count = stream.frames or sum(1 for _ in container.decode(stream))
    except (av.FFmpegError, OSError) as error:
        raise UnreadableVideo(f"{path} cannot be decoded: {error}") from error
    return count, own_fps


def codec_of(path: Path) -> str | None:
    """The codec that a file's video stream is in, such as h264; None where there is none to read."""
    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].codec_context.name if container.streams.video else None
    except (av.FFmpegError, OSError):
        return None


def write_video(
    target: Path | BinaryIO, clip: Frames, *, fps: int, codec: str, crf: int | None = None, container: str | None = None
) -> None:
    """Encode uint8 [T, H, W, 3]. `crf` is the rate factor of H.264, or the quantiser of MPEG-4 (2-31)."""
    options = {}
    if crf is not None:
        options = {"crf": str(crf)} if codec == "libx264" else {"qmin": str(crf), "qmax": str(crf)}
    path = str(target) if isinstance(target, Path) else target
    with av.open(path, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in clip:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        output.mux(stream.encode())


def _fit(frame: Frames, height: int, width: int) -> Frames:
    own_height, own_width = frame.shape[:2]
    if (own_height, own_width) == (height, width):
        return frame
    scale = max(height / own_height, width / own_width)
    new_height, new_width = max(height, round(own_height * scale)), max(width, round(own_width * scale))
    mode = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(frame, (new_width, new_height), interpolation=mode)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return np.asarray(resized[top : top + height, left : left + width], np.uint8)
