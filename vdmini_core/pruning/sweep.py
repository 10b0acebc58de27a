"""The measuring itself: bypass after bypass, batch after batch of clips, each beside the intact network's.

A round is one batch. What a bypass does to the clips of a round depends on nothing else, so rounds of some units can
be measured by other processes, and what is on disk is not measured again. A unit that is decided is left out of the
rounds that follow.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdmini_core.data.latents import LatentCache
from vdmini_core.evaluation.evaluator import Evaluator, accuracies
from vdmini_core.evaluation.metrics.paired import HARMLESS, Seen, estimate, paired, see
from vdmini_core.evaluation.quality import Judged, generate
from vdmini_core.models import Pipeline
from vdmini_core.models.shared_start import Cut, SharedStart
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import SensitivitySettings

INTACT = "intact"
NO_OP = "no-op"
DECIDING = ("content", "motion")
FEWEST = 4  # clips before anything is decided: the interval of fewer says nothing

Round = dict[str, Tensor]
"""Of the clips of a round, first dimension: the paired measures, the evaluator's features `content_features` and
`motion_features`, and `right` where clips carry labels. `calls` [2]: calls of the network a clip, in full and from
the shared start."""


Groups = Sequence[Sequence[str]]


class Sweep:
    """The rounds of one sensitivity analysis, on disk under `folder` where one is given.

    `cuts` are the bypasses by the name of their unit or block. Clips are those of `data` from `first` on.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        data: LatentCache,
        evaluator: Evaluator,
        settings: SensitivitySettings,
        cuts: Mapping[str, Cut],
        *,
        first: int = 0,
        folder: Path | None = None,
        track: Track = silent_track,
    ) -> None:
        self.pipeline, self.data, self.evaluator, self.settings = pipeline, data, evaluator, settings
        self.cuts = {**cuts, NO_OP: Cut((), {}, ())}
        self.first, self.folder, self.track = first, folder, track
        self.taken: dict[str, int] = {}
        self._found: dict[tuple[str, int], Round] = {}

    def clips_of(self, round_: int) -> range:
        """Which clips a round has, counted from `first`."""
        start = round_ * self.settings.batch_size
        return range(start, min(start + self.settings.batch_size, self.settings.clips))

    @property
    def rounds(self) -> int:
        """How many rounds there are for a unit that is not decided before."""
        return -(-self.settings.clips // self.settings.batch_size)

    def measure(self, round_: int, names: Iterable[str]) -> None:
        """Measure one round of the named units or blocks, and of the intact network, unless it is there already."""
        missing = [name for name in dict.fromkeys(names) if self.found(name, round_) is None]
        if not missing and self.found(INTACT, round_) is not None:
            return
        clips = self.clips_of(round_)
        rows = self.data.rows([self.first + clip for clip in clips])
        shared = SharedStart(self.pipeline.denoiser, [self.cuts[name] for name in missing if self.settings.share_start])

        def seen(name: str) -> Seen:
            network = shared.intact if name == INTACT else shared.without(self.cuts[name])
            with torch.no_grad():
                return see(generate(self.pipeline, network, rows, clips.start, self.settings), self.evaluator)

        intact = seen(INTACT)
        self._keep(INTACT, round_, self._round(intact, intact, rows, (self.settings.steps, 0)))
        if not self.settings.share_start:
            shared.inputs = []
        for name in self.track(missing, f"bypass, clips {clips.start + 1}-{clips.stop}", len(missing)):
            clips_without = seen(name)
            calls = tuple(shared.calls[self.cuts[name].names, shortened] for shortened in (False, True))
            self._keep(name, round_, self._round(clips_without, intact, rows, calls))

    def _round(self, clips: Seen, intact: Seen, rows: dict[str, Tensor], calls: Sequence[int]) -> Round:
        judgement, labels = clips.judgement, rows["labels"]
        found = paired(clips, intact) | {
            "content_features": judgement.content.float().cpu(),
            "motion_features": judgement.motion.float().cpu(),
            "calls": torch.tensor(calls),
        }
        if bool((labels >= 0).all()):
            found["right"] = torch.stack(accuracies(judgement, labels.to(judgement.content.device)), 1).cpu()
        return found

    def found(self, name: str, round_: int) -> Round | None:
        """A measured round, from memory or disk; None where it is yet to be measured."""
        key = name, round_
        if key not in self._found and self.folder is not None and (file := self._file(name, round_)).is_file():
            self._found[key] = load_file(file)
        return self._found.get(key)

    def _keep(self, name: str, round_: int, found: Round) -> None:
        self._found[name, round_] = found
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self._file(name, round_)
            draft = file.with_name(f".{file.name}.partial")
            save_file({key: value.contiguous() for key, value in found.items()}, draft)
            draft.replace(file)

    def _file(self, name: str, round_: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.{round_}.safetensors"

    def measured(self, name: str, rounds: int | None = None) -> Round:
        """The first rounds of a unit, joined: as many as it took part in, if nothing else is asked for."""
        wanted = self.taken.get(name, self.rounds) if rounds is None else rounds
        found = [one for r in range(wanted) if (one := self.found(name, r)) is not None]
        joined = {key: torch.cat([one[key] for one in found]) for key in found[0] if key != "calls"}
        return joined | {"calls": found[0]["calls"]}

    def run(self, groups: Groups, always: Sequence[str] = ()) -> None:
        """Measure every name of every group, until it is decided.

        Units compete within their group: blocks with blocks, pairs with pairs. `always` get all clips unless harmless.
        """
        self.measure(0, [NO_OP])
        for round_ in range(self.rounds):
            self.measure(round_, self.open_in(round_, groups, always))

    def open_in(self, round_: int, groups: Groups, always: Sequence[str] = ()) -> list[str]:
        """Whose turn it is in a round: those that the rounds before it, which have to be there, leave undecided."""
        names = [name for group in groups for name in group]
        self.taken = dict.fromkeys(names, 1)
        for done in range(1, round_ + 1):
            if self.settings.stop_early and self.clips_of(done - 1).stop >= FEWEST:
                settled = self._decided(groups, always)
                names = [name for name in names if name not in settled]
            self.taken |= dict.fromkeys(names, done + 1)
        return names

    def _decided(self, groups: Groups, always: Sequence[str]) -> set[str]:
        """Of all groups, from what was measured so far."""
        found: set[str] = set()
        for group in filter(None, groups):  # a transformer has no pairs
            measured = {name: self.measured(name) for name in group}
            values = {m: {name: measured[name][m].numpy() for name in group} for m in DECIDING}
            found |= decided(values, self.settings, always)
        return found


def decided(
    values: Mapping[str, Mapping[str, npt.NDArray[Any]]], settings: SensitivitySettings, always: Sequence[str] = ()
) -> set[str]:
    """The units of which enough is known: measure -> unit -> its damage, one number a clip.

    By the intervals of all measures either harmless, or below the middle between the upper and the lower half of the
    units, or known in rank, which means that no other unit's interval overlaps. So the upper half is measured until
    it is in order. `always` have to be harmless.
    """
    known: list[list[set[str]]] = [[], [], []]
    for of in values.values():
        found = {name: estimate(value, settings.seed, settings.confidence) for name, value in of.items()}
        means = sorted(e.value for e in found.values())
        middle = (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2
        apart = {
            name
            for name, e in found.items()
            if all(e.high < o.low or o.high < e.low for other, o in found.items() if other != name)
        }
        known[0].append({name for name, e in found.items() if e.high < HARMLESS})
        known[1].append({name for name, e in found.items() if e.high < middle})
        known[2].append(apart)
    harmless, low, ranked = (set.intersection(*sets) for sets in known)
    return harmless | ((low | ranked) - set(always))


def judged(found: Round) -> Judged:
    """A unit's clips as a set, for distances and accuracies."""
    return Judged(found["content_features"], found["motion_features"], found.get("right"))
