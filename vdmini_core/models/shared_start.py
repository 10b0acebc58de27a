"""Starts in the middle: what a network computes before the first bypassed unit is taken from the intact network's call.

The same latents, time and condition give the same activations up to there. In sampling that is the first step, in
one-step models all of it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdmini_core.models.graph import Condition, Denoiser, StandIns, answering

Prefix = tuple[str, ...]
"""Paths of the outermost modules that are done before a bypass begins."""


@dataclass(frozen=True)
class Cut:
    """A bypass: the units or blocks that fall silent, what stands in for them, and what comes before them."""

    names: tuple[str, ...]
    stand_ins: StandIns
    prefix: Prefix


def find_cuts(
    denoiser: Denoiser,
    bypasses: Iterable[tuple[str, ...]],
    latents: Tensor,
    condition: Condition,
    stand_ins: StandIns | None = None,
) -> dict[tuple[str, ...], Cut]:
    """Every bypass with its prefix, found by one call on the meta device with inputs so shaped."""
    twin = denoiser.on_meta()
    started, finished, calls = _traced(twin, latents, condition)
    cuts = {}
    for names in bypasses:
        silent = [started[path] for path in twin.silent_modules(names) if path in started]
        begin = min(silent, default=math.inf)
        done = {path for path, end in finished.items() if end < begin and calls[path] == 1}
        outermost = tuple(path for path in finished if path in done and not done & set(_parents(path)))
        cuts[names] = Cut(names, stand_ins or {}, outermost)
    return cuts


def _parents(path: str) -> list[str]:
    """Of a module, outermost first; the network itself is ""."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(len(parts))]


def _traced(
    twin: Denoiser, latents: Tensor, condition: Condition
) -> tuple[dict[str, int], dict[str, int], Counter[str]]:
    """When each module starts and ends, by a clock that ticks at both, and how often it is called."""
    started: dict[str, int] = {}
    finished: dict[str, int] = {}
    calls: Counter[str] = Counter()
    tick = iter(range(1_000_000_000))

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            started.setdefault(path, next(tick))
            calls[path] += 1

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            finished[path] = next(tick)

        return hook

    for path, module in twin.model.named_modules():
        module.register_forward_pre_hook(before(path))
        module.register_forward_hook(after(path))
    with torch.no_grad():
        call_on_meta(twin, latents, condition)
    return started, finished, calls


def call_on_meta(twin: Denoiser, latents: Tensor, condition: Condition) -> Tensor:
    """One call of a network without weights, with inputs so shaped."""
    meta = {key: value.to("meta") for key, value in condition.items()}
    return twin(latents.to("meta"), torch.ones(len(latents), device="meta"), meta)


class SharedStart:
    """The intact network's first call, kept for the same call without some units; for one batch of clips.

    Answers are the same as without sharing. Memory: the outputs of all modules in the cuts' prefixes, about one
    activation a unit. `calls` counts what was called, by names and whether it started in the middle.
    """

    def __init__(self, denoiser: Denoiser, cuts: Iterable[Cut]) -> None:
        self.denoiser = denoiser
        self.wanted = sorted({path for cut in cuts for path in cut.prefix})
        self.kept: dict[str, Any] = {}
        self.inputs: list[Tensor] = []
        self.calls: Counter[tuple[tuple[str, ...], bool]] = Counter()

    def intact(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The intact network's answer; the first call's activations are kept."""
        self.calls[(), False] += 1
        if self.inputs:
            return self.denoiser(latents, time, condition)
        self.inputs = _inputs(latents, time, condition)
        return self.record(latents, time, condition)

    def record(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The intact network's answer, while what the prefixes need of it is kept."""

        def keep(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.kept[path] = output

            return hook

        handles = [self.denoiser.model.get_submodule(p).register_forward_hook(keep(p)) for p in self.wanted]
        try:
            return self.denoiser(latents, time, condition)
        finally:
            for handle in handles:
                handle.remove()

    def without(self, cut: Cut) -> Callable[[Tensor, Tensor, Condition], Tensor]:
        """What answers as the network with the cut's units bypassed, starting in the middle where it can."""

        def network(latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
            now = _inputs(latents, time, condition)
            same = len(now) == len(self.inputs) and all(map(_equal, now, self.inputs))
            self.calls[cut.names, same] += 1
            return self.replay(cut, latents, time, condition, from_the_start=not same)

        return network

    def replay(
        self, cut: Cut, latents: Tensor, time: Tensor, condition: Condition, *, from_the_start: bool = False
    ) -> Tensor:
        """One call with the cut's units bypassed, its prefix answered from what was kept."""
        with ExitStack() as stack:
            stack.enter_context(self.denoiser.bypass(cut.names, cut.stand_ins))
            for path in () if from_the_start else cut.prefix:
                stack.enter_context(answering(self.denoiser.model.get_submodule(path), _constant(self.kept[path])))
            return self.denoiser(latents, time, condition)


def _inputs(latents: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> list[Tensor]:
    return [latents, time, *(condition[key] for key in sorted(condition))]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **named: value
