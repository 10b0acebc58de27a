"""Whether a removal of U-Net pairs is the same as its bypass, found by running both with names instead of tensors.

Knows nothing of the rules: it pushes and pops skip connections as a U-Net does.
"""

from collections.abc import Collection, Sequence

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
