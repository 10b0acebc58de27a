"""VBench's prompts and the videos they ask for: names, completeness, and subsets.

The official code finds a video by its name alone, `{prompt}-{0..4}.mp4` in one flat folder, warns where one is
missing, and takes the suffix from the folder's first entry, so that a stray file hides all the others.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdmini_core.artifacts import Record, json_digest
from vdmini_core.evaluation.generation import Order
from vdmini_core.evaluation.vbench.scores import DIMENSIONS, VIDEOS_PER_PROMPT

SUFFIX = ".mp4"
FULL_INFO = {"t2v": "vbench/VBench_full_info.json", "i2v": "vbench2_beta_i2v/vbench2_i2v_full_info.json"}
"""Where a checkout of the official code has the prompts of a suite."""
IMAGES = "vbench2_beta_i2v/data/crop"
"""Where it has the images, by aspect ratio, once its download script ran."""


@dataclass(frozen=True)
class Suite:
    """The entries of an official full_info.json: prompt_en, dimension, and what else the official code reads."""

    name: str
    entries: tuple[dict[str, Any], ...]
    per_dimension: int | None = None

    def prompts(self, dimension: str | None = None) -> list[str]:
        """Unique prompts in the file's order, of one dimension or of all."""
        chosen = (e["prompt_en"] for e in self.entries if dimension is None or dimension in e["dimension"])
        return list(dict.fromkeys(chosen))

    def dimensions(self) -> list[str]:
        """Those that have prompts, in the suite's order."""
        found = {name for entry in self.entries for name in entry["dimension"]}
        return [name for name in DIMENSIONS[self.name] if name in found]

    def videos(self, dimension: str | None = None) -> list[str]:
        """The file names asked for, of one dimension or of all."""
        return [video_name(prompt, index) for prompt in self.prompts(dimension) for index in range(VIDEOS_PER_PROMPT)]

    def digest(self) -> str:
        """Of the prompts, their dimensions and what else the official code reads."""
        return json_digest(list(self.entries))

    def subset(self, per_dimension: int, seed: int = 0) -> "Suite":
        """`per_dimension` prompts of each dimension, drawn once; dimensions that share prompts share the drawn ones."""
        if per_dimension < 1:
            raise ValueError(f"a subset has at least one prompt a dimension, got {per_dimension}")
        chosen = {
            name: set(sorted(self.prompts(name), key=lambda prompt: json_digest([seed, prompt]))[:per_dimension])
            for name in self.dimensions()
        }
        return Suite(self.name, self._kept(lambda name, prompt: prompt in chosen.get(name, ())), per_dimension)

    def only(self, dimensions: Sequence[str]) -> "Suite":
        """The prompts of these dimensions; ValueError names one that the suite has not."""
        for name in dimensions:
            if name not in DIMENSIONS[self.name]:
                raise ValueError(
                    f"{name!r} is no dimension of VBench {self.name}; there are {', '.join(DIMENSIONS[self.name])}"
                )
        return Suite(self.name, self._kept(lambda name, _: name in dimensions), self.per_dimension)

    def _kept(self, keep: Any) -> tuple[dict[str, Any], ...]:
        kept = []
        for entry in self.entries:
            dimensions = [name for name in entry["dimension"] if keep(name, entry["prompt_en"])]
            if dimensions:
                kept.append({**entry, "dimension": dimensions})
        return tuple(kept)


def read_suite(name: str, full_info: Path) -> Suite:
    """Read an official full_info.json; dimensions that do not count towards the suite's total are dropped."""
    if name not in DIMENSIONS:
        raise ValueError(f"there is no VBench suite {name!r}; there are {', '.join(DIMENSIONS)}")
    if not full_info.is_file():
        raise FileNotFoundError(f"{full_info} does not exist; expected a checkout of github.com/Vchitect/VBench")
    try:
        entries = json.loads(full_info.read_text(encoding="utf-8"))
        for entry in entries:
            video_name(entry["prompt_en"], 0)
            list(entry["dimension"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{full_info} is no list of prompts as VBench has them: {error}") from None
    return Suite(name, tuple(entries)).only(DIMENSIONS[name])


def video_name(prompt: str, index: int) -> str:
    """The file that the official code looks for."""
    if "/" in prompt or "\0" in prompt:
        raise ValueError(f"prompt {prompt!r} cannot be a file's name")
    return f"{prompt}-{index}{SUFFIX}"


def orders_of(suite: Suite, seed: int, images: Path | None = None) -> list[Order]:
    """The videos to make. Seeds differ from video to video and depend on the prompt, not on the subset.

    `images` is the folder of a suite that begins with images; FileNotFoundError names the first that is not there.
    """
    sources = {e["prompt_en"]: images / e["image_name"] for e in suite.entries if images and "image_name" in e}
    for path in sources.values():
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; vbench2_beta_i2v/download_data.sh in the checkout fetches the images"
            )
    return [
        Order(video_name(prompt, index), prompt, seed_of(seed, prompt, index), sources.get(prompt))
        for prompt in suite.prompts()
        for index in range(VIDEOS_PER_PROMPT)
    ]


def seed_of(seed: int, prompt: str, index: int) -> int:
    """31 bits from a digest."""
    return int(json_digest([seed, prompt, index])[:8], 16) >> 1


class Layout(Record):
    """What a folder of videos has of what a suite asks for."""

    expected: int
    missing: tuple[str, ...]
    stray: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the official code would find every video, and nothing else."""
        return not self.missing and not self.stray


def check_layout(folder: Path, suite: Suite, whole: Suite) -> Layout:
    """Compare a folder with a suite; videos of the whole one may lie in it, anything else is stray.

    An empty file is missing: it is what a full disk leaves behind.
    """
    if not folder.is_dir():
        return Layout(expected=len(suite.videos()), missing=tuple(suite.videos()), stray=())
    there = {path.name: path.is_file() and path.stat().st_size > 0 for path in folder.iterdir()}
    known = set(whole.videos())
    return Layout(
        expected=len(suite.videos()),
        missing=tuple(name for name in suite.videos() if not there.get(name)),
        stray=tuple(sorted(name for name in there if name not in known)),
    )


def layout_text(layout: Layout, folder: Path) -> str:
    """What is wrong with a folder, for a person to mend."""
    parts = []
    if layout.missing:
        parts.append(f"{len(layout.missing)} of {layout.expected} videos are missing ({_some(layout.missing)})")
    if layout.stray:
        parts.append(f"{len(layout.stray)} entries belong to no prompt ({_some(layout.stray)}); move them away")
    return f"{folder}: {'; '.join(parts)}"


def _some(names: Iterable[str], count: int = 3) -> str:
    shown = list(names)
    return ", ".join(shown[:count]) + (", ..." if len(shown) > count else "")
