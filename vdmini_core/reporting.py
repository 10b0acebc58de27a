"""How long work in the core speaks: one callable for numbers, one for progress, neither prints."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Log(Protocol):
    """Receives metrics of one step; names are slash-separated, values are plain floats."""

    def __call__(self, metrics: dict[str, float], step: int) -> None: ...


class Track(Protocol):
    """Wraps an iterable to show progress, as tqdm does."""

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]: ...


def silent_log(metrics: dict[str, float], step: int) -> None:
    """Drop the metrics."""


def silent_track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate without showing anything."""
    return iter(items)
