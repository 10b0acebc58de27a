"""Students of one size, made in several ways: the paper's layout, and what its Table 3 compares it with.

All have as many parameters as the paper's layout, within 1%. `random` and `uniform` measure nothing: they choose among
all legal removals of that size.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from vdmini_core.artifacts import Provenance, Record
from vdmini_core.data.latents import LatentCache
from vdmini_core.diffusion.process import Process
from vdmini_core.evaluation.costs import unit_parameters
from vdmini_core.models import Denoiser, IllegalPlan, UNetDenoiser
from vdmini_core.models.graph import expand
from vdmini_core.pruning.channels import CRITERIA, TOLERANCE, prune_channels
from vdmini_core.pruning.planning import paper_layout
from vdmini_core.settings import PlanSettings

Removal = tuple[str, ...]


@dataclass(frozen=True)
class Student:
    """A pruned network, the units it is without, and of features that lost channels the teacher's that are left."""

    denoiser: Denoiser
    removed: Removal = ()
    channels: dict[str, tuple[int, ...]] = field(default_factory=dict)


class StudentFacts(Record):
    """What is kept of a student beside its weights; `fingerprint` names everything it was made from."""

    method: str
    removed: Removal
    channels: dict[str, tuple[int, ...]]
    parameters: int
    fingerprint: str
    provenance: Provenance


@dataclass(frozen=True)
class Pruning:
    """What a method may read: the teacher, its noise algebra, encoded training clips, and a seed."""

    teacher: Denoiser
    process: Process
    data: LatentCache
    seed: int

    @property
    def layout(self) -> Removal:
        """The paper's layout for this teacher."""
        return paper_layout(self.teacher, PlanSettings())

    @property
    def budget(self) -> int:
        """Parameters of the paper's layout."""
        return parameters_of(self.teacher.on_meta().without(self.layout, shared=True))


def without_units(pruning: Pruning, removed: Iterable[str]) -> Student:
    """The teacher without units or blocks; IllegalPlan where that is no network."""
    units = expand(removed, pruning.teacher.units)
    return Student(pruning.teacher.without(units), units)


def _of_channels(criterion: str, pruning: Pruning) -> Student:
    denoiser, channels = prune_channels(
        pruning.teacher, criterion, pruning.budget, pruning.data, pruning.process, pruning.seed
    )
    return Student(denoiser, channels=channels)


def _uniform(pruning: Pruning) -> Student:
    names = [unit.name for unit in pruning.teacher.units]
    return without_units(pruning, uniform_removal(removals_of_size(pruning.teacher, pruning.budget), names))


def _random(pruning: Pruning) -> Student:
    return without_units(pruning, random_removal(removals_of_size(pruning.teacher, pruning.budget), pruning.seed))


METHODS: dict[str, Callable[[Pruning], Student]] = {
    "paper": lambda pruning: without_units(pruning, pruning.layout),
    "uniform": _uniform,
    "random": _random,
    **{criterion: partial(_of_channels, criterion) for criterion in CRITERIA},
}
SEEDED = ("random",)
"""Methods whose student is another one each seed."""


def student_by(method: str, pruning: Pruning) -> Student:
    """The student that a method makes; ValueError lists the methods."""
    if method not in METHODS:
        raise ValueError(f"there is no pruning method {method!r}; the methods are {', '.join(METHODS)}")
    return METHODS[method](pruning)


def parameters_of(denoiser: Denoiser) -> int:
    """Of the whole network."""
    return sum(parameter.numel() for parameter in denoiser.model.parameters())


def removals_of_size(denoiser: Denoiser, parameters: int) -> list[Removal]:
    """Every legal removal that leaves so many parameters within 1%, in graph order.

    IllegalPlan where there is none, or where the graph is too large to list them: it has to be a U-Net.
    """
    if not isinstance(denoiser, UNetDenoiser):
        raise IllegalPlan("the removals of a transformer are too many to list; random and uniform are for U-Nets here")
    sizes = removal_sizes(denoiser, legal_removals(denoiser))
    found = [removal for removal, size in sizes.items() if abs(size / parameters - 1) <= TOLERANCE]
    if not found:
        nearest = min(sizes.values(), key=lambda size: abs(size - parameters))
        raise IllegalPlan(
            f"no legal removal leaves {parameters:,} parameters within {TOLERANCE:.0%}; the nearest leaves {nearest:,}"
        )
    return found


def legal_removals(denoiser: UNetDenoiser) -> list[Removal]:
    """All of them, () included: whole inner stages, of the next one what is legal then, of others what is by itself."""
    units, depths = denoiser.units, sorted({unit.depth for unit in denoiser.units})
    of_stage = [[unit.name for unit in units if unit.depth == depth] for depth in depths]
    legal = [[names for names in _subsets(stage) if _is_legal(denoiser, names)] for stage in of_stage]
    found: dict[Removal, None] = {}
    for stages in range(len(depths), 0, -1):  # those that are left
        inner = [unit.name for unit in units if unit.depth >= stages]
        innermost = [names for names in _subsets(of_stage[stages - 1]) if _is_legal(denoiser, {*inner, *names})]
        for choice in itertools.product(*legal[: stages - 1], innermost):
            removed = {*inner, *itertools.chain(*choice)}
            removal = tuple(unit.name for unit in units if unit.name in removed)
            if removal not in found and _is_legal(denoiser, removal):
                found[removal] = None
    return list(found)


def removal_sizes(denoiser: Denoiser, removals: Iterable[Removal]) -> dict[Removal, int]:
    """Parameters that each removal leaves: without the units, and without the samplers of stages that go whole."""
    twin, of_units, whole = denoiser.on_meta(), unit_parameters(denoiser), parameters_of(denoiser)
    depth_of = {unit.name: unit.depth for unit in denoiser.units}
    there = Counter(depth_of.values())
    samplers: dict[int, int] = {}  # by the first depth that goes whole: what goes besides units, counted once
    sizes = {}
    for removal in removals:
        gone = Counter(depth_of[name] for name in removal)
        outside = max(depth for depth in there if gone[depth] < there[depth]) + 1
        size = whole - sum(of_units[name] for name in removal)
        if outside in there:
            if outside not in samplers:
                samplers[outside] = size - parameters_of(twin.without(removal, shared=True))
            size -= samplers[outside]
        sizes[removal] = size
    return sizes


def random_removal(candidates: Sequence[Removal], seed: int) -> Removal:
    """One of them, each as likely as the others."""
    return random.Random(seed).choice(candidates)


def uniform_removal(candidates: Sequence[Removal], names: Sequence[str]) -> Removal:
    """The one whose units lie most evenly along the network, whose units these are in order; of equals the first."""
    return min(candidates, key=lambda removal: unevenness(names, removal))


def unevenness(names: Sequence[str], removal: Removal) -> float:
    """Kolmogorov's distance between where the removed units lie and an even distribution: 0 is even, 1 one-sided."""
    gone = list(itertools.accumulate(name in removal for name in names))
    return max(abs(count / gone[-1] - (place + 1) / len(names)) for place, count in enumerate(gone))


def _subsets(names: Sequence[str]) -> list[Removal]:
    return [chosen for size in range(len(names) + 1) for chosen in itertools.combinations(names, size)]


def _is_legal(denoiser: Denoiser, names: Iterable[str]) -> bool:
    try:
        denoiser.check(names)
    except IllegalPlan:
        return False
    return True
