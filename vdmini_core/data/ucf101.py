"""Finds the clips of a data set: the UCF101 layout, or any folder of videos; writes the synthetic one.

Layout: `UCF-101/<Class>/v_<Class>_gNN_cNN.avi` and `ucfTrainTestlist/` with `classInd.txt`
("1 ApplyEyeMakeup"), `trainlist0{1,2,3}.txt` ("Class/file.avi 1") and `testlist0{1,2,3}.txt`
(without labels).
"""

import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np

from vdmini_core.artifacts import Clip, DataManifest, json_digest
from vdmini_core.data.synthetic import ALL_LABELS, LABEL_BY_CLASS, Label, describe_label, render_clip
from vdmini_core.data.video import VIDEO_SUFFIXES, UnreadableVideo, read_clip, write_video
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import DataSettings, height_and_width

SYNTHETIC_FPS = 8
GROUPS_PER_SPLIT = 2


class EmptyDataset(ValueError):
    """No usable clip; the message says where was looked and what was skipped."""


def write_synthetic(folder: Path, settings: DataSettings, track: Track = silent_track) -> None:
    """Write the built-in data set in UCF101's layout: every class in `groups_per_class` groups.

    Of any six groups, the first two are the test clips of split 1, the next two of split 2, the last
    of split 3, so that no clip is in both lists of a split. ValueError unless `size` is square.
    """
    height, width = height_and_width(settings.size)
    if height != width:
        raise ValueError(f"data.size is {height} x {width}, but synthetic clips are square; give one side")
    files = [(label, group) for label in ALL_LABELS for group in range(settings.groups_per_class)]
    with ProcessPoolExecutor(2) as pool:
        jobs = pool.map(_write_one, files, repeat(folder), repeat(settings), chunksize=32)
        for _ in track(jobs, "synthesise", len(files)):
            pass
    lists = folder / "ucfTrainTestlist"
    lists.mkdir(parents=True, exist_ok=True)
    numbers = {label.class_name: index + 1 for index, label in enumerate(ALL_LABELS)}
    (lists / "classInd.txt").write_text("".join(f"{n} {name}\n" for name, n in numbers.items()))
    for split in (1, 2, 3):
        test = {(split - 1) * GROUPS_PER_SPLIT + offset for offset in range(GROUPS_PER_SPLIT)}
        names = [(label.class_name, group, f"{label.class_name}/{_file_name(label, group)}") for label, group in files]
        train = [f"{path} {numbers[name]}\n" for name, group, path in names if group % 6 not in test]
        held_out = [f"{path}\n" for _, group, path in names if group % 6 in test]
        (lists / f"trainlist0{split}.txt").write_text("".join(train))
        (lists / f"testlist0{split}.txt").write_text("".join(held_out))


def _file_name(label: Label, group: int) -> str:
    return f"v_{label.class_name}_g{group + 1:02d}_c01.avi"


def _write_one(file: tuple[Label, int], folder: Path, settings: DataSettings) -> None:
    label, group = file
    rng = np.random.default_rng((settings.seed, 101, ALL_LABELS.index(label), group))
    clip = render_clip(label, rng, frames=settings.frames, size=height_and_width(settings.size)[0])
    target = folder / "UCF-101" / label.class_name / _file_name(label, group)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_video(target, clip, fps=SYNTHETIC_FPS, codec="mpeg4", crf=settings.quantiser)


def index_clips(root: Path, settings: DataSettings, track: Track = silent_track) -> DataManifest:
    """List the readable clips under `root`; unreadable or too short files are skipped and named.

    Every file is decoded once here, so that no later stage meets a broken one. Without split lists a
    fifth of the files, chosen by a digest of their names, is the test set.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data.source {str(root)!r} does not exist; give `synthetic` or an existing folder")
    layout, files = listed_videos(root, settings.split)
    clips, skipped = [], {}
    with ProcessPoolExecutor(2) as pool:
        problems = pool.map(_problem, [root / path for path, _, _ in files], repeat(settings), chunksize=16)
        for (path, name, split), problem in zip(files, track(problems, "check videos", len(files)), strict=True):
            if problem is None:
                known = LABEL_BY_CLASS.get(name)
                label = (known.shape, known.colour, known.motion) if known else None
                clips.append(Clip(path=path, class_name=name, split=split, label=label))
            else:
                skipped[path] = problem
    if not any(clip.split == "train" for clip in clips) or not any(clip.split == "test" for clip in clips):
        shown = "; ".join(f"{path}: {why}" for path, why in list(skipped.items())[:3])
        raise EmptyDataset(
            f"data.source {str(root)!r} has no usable train and test clips: {len(files)} video files found, "
            f"{len(skipped)} skipped{' (' + shown + ')' if shown else ''}; expected UCF-101/<Class>/*.avi with "
            f"ucfTrainTestlist/, or at least five videos ({', '.join(VIDEO_SUFFIXES)}) of {settings.frames} frames"
        )
    return DataManifest(
        root=str(root),
        layout=layout,
        frames=settings.frames,
        size=settings.size,
        fps=settings.fps,
        clips=tuple(clips),
        skipped=skipped,
        digest=json_digest([[c.path, (root / c.path).stat().st_size] for c in clips]),
    )


def listed_videos(root: Path, split: int) -> tuple[str, list[tuple[str, str, str]]]:
    """The layout, ucf101 or folder, and of every listed file its path below `root`, class, and train or test."""
    lists = root / "ucfTrainTestlist"
    if (root / "UCF-101").is_dir() and lists.is_dir():
        files = []
        for name in ("train", "test"):
            lines = (lists / f"{name}list0{split}.txt").read_text().splitlines()
            for entry in (line.split()[0] for line in lines if line.strip()):
                files.append((f"UCF-101/{entry}", entry.split("/")[0], name))
        return "ucf101", files
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    paths = [str(p.relative_to(root)) for p in found]
    held_out = set(sorted(paths, key=lambda p: json_digest([p]))[: max(len(paths) // 5, 1)])
    return "folder", [(p, Path(p).parent.name, "test" if p in held_out else "train") for p in paths]


def _problem(path: Path, settings: DataSettings) -> str | None:
    try:
        read_clip(path, frames=settings.frames, fps=settings.fps, size=settings.size)
    except UnreadableVideo as error:
        return str(error).replace(str(path), path.name)
    return None


def choose(manifest: DataManifest, split: str, count: int, seed: int) -> list[Clip]:
    """`count` clips of a split, or all there are, in a seeded order that spreads over classes."""
    by_class: dict[str, list[Clip]] = {}
    rng = np.random.default_rng(seed)
    pool = [clip for clip in manifest.clips if clip.split == split]
    for index in rng.permutation(len(pool)):
        by_class.setdefault(pool[index].class_name, []).append(pool[index])
    classes = list(by_class.values())
    rounds: Iterable[Clip] = (c[i] for i in range(max(map(len, classes))) for c in classes if i < len(c))
    return list(rounds)[:count]


def caption_of(clip: Clip) -> str:
    """What a text-to-video model is told of a clip: the synthetic label in words, or the words of its class."""
    if clip.label is not None:
        return describe_label(Label(*clip.label))
    return class_words(clip.class_name)


def class_words(name: str) -> str:
    """`ApplyEyeMakeup` -> `apply eye makeup`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").lower()
