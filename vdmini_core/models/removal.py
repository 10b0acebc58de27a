"""What may be removed together, as data: linear rules on the units that are kept.

A graph refuses what breaks one of its rules, and the planner solves under the same rules: there is one truth.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Legal is what keeps `low` <= the sum of `terms` over the kept units <= `high`.

    `broken` says, given the removed units, what is wrong and what to do instead; it follows "removing ... ".
    """

    terms: Mapping[str, int]
    low: int
    high: int
    broken: Callable[[Collection[str]], str]

    def holds(self, removed: Collection[str]) -> bool:
        """Whether the removal keeps to the rule."""
        return self.low <= sum(weight for unit, weight in self.terms.items() if unit not in removed) <= self.high


@dataclass(frozen=True)
class Piece:
    """What belongs to no unit, but goes once all of `units` do, such as the samplers of a stage: paths of modules."""

    name: str
    units: tuple[str, ...]
    modules: tuple[str, ...]


def kept(units: Collection[str], why: str) -> tuple[Rule, ...]:
    """Rules that none of the units goes."""

    def rule(unit: str) -> Rule:
        return Rule({unit: 1}, 1, 1, lambda removed: f"takes out {unit}, {why}")

    return tuple(map(rule, units))
