"""The block graph: the removable units of a video denoiser, named in the paper's vocabulary."""

from collections.abc import Iterable
from dataclasses import dataclass


class IllegalPlan(ValueError):
    """The removal would not leave a working model; the message says why and what to do instead."""


@dataclass(frozen=True)
class Unit:
    """The smallest piece that can be bypassed.

    `name` is `D.<stage>.<pair>`, `M` or `U.<stage>.<pair>` (R-A pairs: a ResBlock with its attention);
    `block` is the name of the block it belongs to; `depth` counts stages from the outermost (0);
    `modules` are the paths of its parts inside the network, the last one being the tapped output.
    """

    name: str
    block: str
    depth: int
    modules: tuple[str, ...]


def expand(names: Iterable[str], units: Iterable[Unit]) -> tuple[str, ...]:
    """Unit names for a mixture of unit and block names, in graph order; unknown names are refused."""
    units = list(units)
    wanted = set(names)
    known = {unit.name for unit in units} | {unit.block for unit in units}
    if unknown := sorted(wanted - known):
        raise IllegalPlan(f"there is no unit {', '.join(unknown)}; the units are {', '.join(sorted(known))}")
    return tuple(unit.name for unit in units if unit.name in wanted or unit.block in wanted)
