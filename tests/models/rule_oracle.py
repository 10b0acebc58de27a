"""Whether a removal of U-Net pairs is the same as its bypass, found by running both with names instead of tensors.

That knows nothing of the rules: it pushes and pops skip connections as a U-Net does. Beside it, what rules allow.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from vdmini_core.models.removal import Rule
from vdmini_core.models.unet_rules import Pair, Stage

START = "conv_in"


def stages_of(widths: Sequence[int], down_pairs: Sequence[int]) -> list[Stage]:
    """Stages as diffusers builds them: the first pair of a block takes up what comes in."""
    count, stages = len(widths), []
    for index, (width, pairs) in enumerate(zip(widths, down_pairs, strict=True)):
        before, inner = widths[max(index - 1, 0)], widths[min(index + 1, count - 1)]
        down, up = f"D.{index}", f"U.{count - 1 - index}"
        downs = tuple(Pair(f"{down}.{i}", width if i else before, width) for i in range(pairs))
        ups = tuple(Pair(f"{up}.{i}", width if i else inner, width) for i in range(pairs + 1))
        stages.append(Stage(down, up, downs, ups))
    return stages


def names_of(stages: Sequence[Stage], mid: str | None) -> list[str]:
    downs = [pair.name for stage in stages for pair in stage.down]
    return downs + [mid] * bool(mid) + [pair.name for stage in reversed(stages) for pair in stage.up]


Skip = tuple[str, int]
"""Whose hidden state, and at the resolution of which stage"""


def inputs_of_kept(stages: Sequence[Stage], removed: Collection[str], bypassed: bool) -> dict[str, tuple[str, Skip]]:
    """Kept unit -> whose hidden state it receives, and which skip connection; IndexError where one lacks.

    Removed for good, a pair makes and uses no skip connection; bypassed, it does, and passes on what it receives.
    """
    found: dict[str, tuple[str, Skip]] = {}
    hidden, skips, none = START, [(START, 0)], ("", 0)
    for index, stage in enumerate(stages):
        for pair in stage.down:
            if pair.name not in removed:
                found[pair.name] = hidden, none
                hidden = pair.name
            if bypassed or pair.name not in removed:
                skips.append((hidden, index))
        if index + 1 < len(stages):
            skips.append((hidden, index + 1))
    if "M" not in removed:
        found["M"] = hidden, none
        hidden = "M"
    for stage in reversed(stages):
        for pair in stage.up:
            if bypassed or pair.name not in removed:
                skip = skips.pop()
            if pair.name not in removed:
                found[pair.name] = hidden, skip
                hidden = pair.name
    if skips:
        raise IndexError("a skip connection is left over")
    return found


def is_removable(stages: Sequence[Stage], removed: Collection[str]) -> bool:
    """Whether what is left receives from the same units as under the bypass, in the widths that it was built for."""
    left = list(stages)
    if "M" in removed:
        while len(left) > 1 and {pair.name for pair in (*left[-1].down, *left[-1].up)} <= set(removed):
            left.pop()
    try:
        student = inputs_of_kept(left, removed, bypassed=False)
    except IndexError:
        return False
    pairs = {pair.name: pair for stage in stages for pair in (*stage.down, *stage.up)}
    narrow = stages[0].up[-1].out
    width = {START: narrow, "M": stages[-1].up[0].received} | {name: pair.out for name, pair in pairs.items()}
    intact = inputs_of_kept(stages, (), bypassed=True)
    fits = all(
        width[hidden] == width["M"]
        if name == "M"
        else (width[hidden] == pairs[name].received and width.get(skip[0]) == width.get(intact[name][1][0]))
        for name, (hidden, skip) in student.items()
    )
    return fits and student == inputs_of_kept(stages, removed, bypassed=True)


def legal_rows(units: Sequence[str], rules: Sequence[Rule]) -> NDArray[np.int8]:
    """Every removal that keeps to the rules, by trying all 2 ** units: a row each, 1 for a unit that is kept."""
    weights = [(rule, np.array([rule.terms.get(unit, 0) for unit in units], dtype=np.int8)) for rule in rules]
    found, low = [], min(len(units), 16)
    inner = (np.arange(2**low)[:, None] >> np.arange(low) & 1).astype(np.int8)
    for high in range(2 ** (len(units) - low)):
        outer = np.array([high >> place & 1 for place in range(len(units) - low)], dtype=np.int8)
        rows = np.hstack([inner, np.broadcast_to(outer, (len(inner), len(outer)))])
        for rule, weight in weights:
            sums = rows @ weight
            rows = rows[(rule.low <= sums) & (sums <= rule.high)]
        found.append(rows)
    return np.vstack(found)


def legal_sets(units: Sequence[str], rules: Sequence[Rule]) -> set[frozenset[str]]:
    """The same as sets of removed units."""
    rows = legal_rows(units, rules)
    return {frozenset(unit for unit, stays in zip(units, row, strict=True) if not stays) for row in rows}
