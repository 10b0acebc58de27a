"""Which pairs of a U-Net can go together: each kept pair must receive what it was trained on.

Up pair j of n reads the output of down pair n - 2 - j of its stage, the last one what enters the stage; a removed
down pair passes on what it receives. So put the pairs of a stage in the order up n - 1, down 0, up n - 2, down 1,
..., up 0: removal is the same as bypass where the kept ones are up and down in turn, starting and ending with up.
That is: of every beginning of this order, the kept up pairs are as many as the kept down pairs, or one more.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vdmini_core.models.removal import Rule


@dataclass(frozen=True)
class Pair:
    """An R-A pair: channels of the hidden state (without a skip) that it receives and that it answers."""

    name: str
    received: int
    out: int


@dataclass(frozen=True)
class Stage:
    """The down and the up block of one resolution, and their names."""

    down_name: str
    up_name: str
    down: tuple[Pair, ...]
    up: tuple[Pair, ...]

    def surplus(self) -> dict[str, int]:
        """Terms of kept up pairs less kept down pairs: 1 where the stage stays, 0 where it goes as a whole."""
        return {pair.name: 1 for pair in self.up} | {pair.name: -1 for pair in self.down}

    def in_turn(self) -> list[str]:
        """The pairs in the order in which up and down have to alternate."""
        ups, downs = [pair.name for pair in reversed(self.up)], [pair.name for pair in self.down]
        return [name for both in itertools.zip_longest(ups, downs) for name in both if name is not None]


def unet_rules(stages: Sequence[Stage], mid: str | None) -> tuple[Rule, ...]:
    """The rules of a U-Net with these stages, the outermost first, around a mid block."""
    inward = [*stages[1:], None]
    return (
        *(rule for stage, inner in zip(stages, inward, strict=True) for rule in _counts(stages, stage, inner, mid)),
        *(rule for stage in stages for rule in _skips(stage)),
        *(rule for stage, inner in zip(stages, inward, strict=True) for rule in _widths(stage, inner)),
    )


def _counts(stages: Sequence[Stage], stage: Stage, inner: Stage | None, mid: str | None) -> Iterator[Rule]:
    """A stage keeps one up pair more than down pairs, or goes as a whole, after everything inside of it."""
    outermost = stage is stages[0]
    whole = "" if outermost else f", or all of them and everything inside of {stage.down_name} and {stage.up_name}"

    def broken(removed: Collection[str]) -> str:
        down, up = (sum(pair.name not in removed for pair in pairs) for pairs in (stage.down, stage.up))
        return (
            f"leaves {stage.down_name} {down} pairs and {stage.up_name} {up}; an up block needs one pair more than its "
            "down block, because every skip connection that is made is used: remove pairs of "
            f"{stage.down_name} and {stage.up_name} together{whole}"
        )

    surplus = stage.surplus()
    yield Rule(surplus, 1 if outermost else 0, 1, broken)
    if not outermost:
        for name in surplus:
            yield Rule(_less(surplus, {name: 1}), 0, 1, broken)
        if inner:
            yield Rule(_less(surplus, inner.surplus()), 0, 1, broken)
        elif mid:
            yield Rule(_less(surplus, {mid: 1}), 0, 1, broken)


def _skips(stage: Stage) -> Iterator[Rule]:
    """Kept up pairs read the skip connections that they were trained on."""
    order, surplus, ups = stage.in_turn(), stage.surplus(), [pair.name for pair in stage.up]

    def broken(removed: Collection[str]) -> str:
        left = [name for name in ups if name not in removed]
        choices = (set(ups).difference(choice) for choice in itertools.combinations(ups, len(left)))
        downs = {name for name in removed if surplus.get(name) == -1}
        fitting = [sorted(gone) for gone in choices if all(rule.holds(gone | downs) for rule in _skips(stage))]
        return (
            f"hands pairs of {stage.up_name} other skip connections than they were trained on; "
            f"of {stage.up_name} remove {' or '.join('+'.join(names) for names in fitting)} instead"
        )

    for end in range(1, len(order)):
        yield Rule({name: surplus[name] for name in order[:end]}, 0, 1, broken)


def _widths(stage: Stage, inner: Stage | None) -> Iterator[Rule]:
    """A pair that changes the width stays with its stage; one that takes up what comes from within, with that."""
    for pairs, within in ((stage.down, stage), (stage.up, inner or stage)):
        for pair in pairs:
            if pair.received != pair.out:
                terms = _less({pair.name: 1}, within.surplus())
                yield Rule(terms, 0, 0, partial(_width_text, stage, pair))


def _width_text(stage: Stage, pair: Pair, removed: Collection[str]) -> str:
    if pair.name not in removed:
        gone = f"{pair.out} channels instead of {pair.received}, as everything inside goes"
        return f"changes what {pair.name} receives: {gone}; remove it as well, with a pair of {stage.down_name}"
    left = [other.name for other in (stage.down if pair in stage.down else stage.up) if other.name not in removed]
    if not left:
        change = f"nothing else changes the width {pair.received} -> {pair.out}"
        return f"leaves {stage.down_name} no pair, and {change}; keep {pair.name}"
    return (
        f"changes what {left[0]} receives: {pair.received} channels instead of {pair.out}; remove a pair that keeps "
        "the width instead (the second of a down block, the middle of an up block)"
    )


def _less(terms: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    """The terms of the difference of two sums."""
    return {name: terms.get(name, 0) - others.get(name, 0) for name in {**terms, **others}}
