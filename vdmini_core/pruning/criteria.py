"""Cheaper guesses at what a unit is worth, each a row of CRITERIA; for all of them higher is more important.

All are sums over a unit's parts, so that a block's is the sum of its units'.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vdmini_core.models import Denoiser
from vdmini_core.models.graph import Unit
from vdmini_core.models.shared_start import Cut, SharedStart
from vdmini_core.pruning.calibration import Calibration, Watcher, tensor_of, watching

Scores = dict[str, float]
"""Unit -> score."""


def magnitude(denoiser: Denoiser, calibration: Calibration, cuts: Mapping[str, Cut], seed: int) -> Scores:
    """Sum of the weights' absolute values (Kim et al. 2024, Shortened LLaMA, arXiv 2402.02834, section 3.1)."""
    return {unit.name: sum(float(w.abs().sum()) for w in weights_of(denoiser, unit)) for unit in denoiser.units}


def taylor(denoiser: Denoiser, calibration: Calibration, cuts: Mapping[str, Cut], seed: int) -> Scores:
    """Sum of |weight x gradient| of the denoising loss (the same, "Taylor"; Molchanov et al. 2019, 1906.10771)."""
    weights = {unit.name: weights_of(denoiser, unit) for unit in denoiser.units}
    every = list(itertools.chain(*weights.values()))
    for weight in every:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            for batch in calibration:
                loss = batch.error(batch.answer(denoiser), batch.target).sum()
                loss.backward()
        clips = sum(len(batch.noisy) for batch in calibration)
        return {
            name: sum(float((w.detach() * w.grad).abs().sum()) / clips for w in own if w.grad is not None)
            for name, own in weights.items()
        }
    finally:
        for weight in every:
            weight.requires_grad_(False)
            weight.grad = None


@torch.no_grad()
def block_influence(denoiser: Denoiser, calibration: Calibration, cuts: Mapping[str, Cut], seed: int) -> Scores:
    """1 - cosine of what a unit receives and answers, a mean over places (Men et al. 2024, ShortGPT, 2403.03853).

    What it receives is what a bypass would pass on, through its shortcut where the width changes.
    """
    found: dict[str, list[Tensor]] = {unit.name: [] for unit in denoiser.units}
    for batch in calibration:
        watchers = {unit.name: _turn(denoiser, unit, batch.noisy, found[unit.name]) for unit in denoiser.units}
        with watching(denoiser, watchers):
            batch.answer(denoiser)
    return {name: float(torch.cat(turns).mean()) for name, turns in found.items()}


def _turn(denoiser: Denoiser, unit: Unit, noisy: Tensor, found: list[Tensor]) -> Watcher:
    """Appends 1 - cosine of each clip to `found`."""
    passed_on = denoiser.identity_of(unit)[unit.modules[0]]

    def see(args: tuple[Any, ...], named: dict[str, Any], answer: Tensor) -> None:
        before, after = (denoiser.as_video(x, noisy) for x in (tensor_of(passed_on(*args, **named)), answer))
        found.append(1 - F.cosine_similarity(before.float(), after.float(), dim=1).flatten(1).mean(1))

    return see


@torch.no_grad()
def output_mse(denoiser: Denoiser, calibration: Calibration, cuts: Mapping[str, Cut], seed: int) -> Scores:
    """Squared change of the network's answer without the unit (LAPTOP-Diff, arXiv 2404.11098: they nearly add up)."""
    found: dict[str, list[Tensor]] = {unit.name: [] for unit in denoiser.units}
    for batch in calibration:
        shared = SharedStart(denoiser, [cuts[name] for name in found])
        inputs = batch.noisy, batch.time, batch.condition
        intact = shared.record(*inputs)
        for name, errors in found.items():
            errors.append(batch.error(shared.replay(cuts[name], *inputs), intact))
    return {name: float(torch.cat(errors).mean()) for name, errors in found.items()}


def random(denoiser: Denoiser, calibration: Calibration, cuts: Mapping[str, Cut], seed: int) -> Scores:
    """A number from [0, 1) of the seed: what a criterion has to beat."""
    draws = np.random.default_rng(seed).random(len(denoiser.units))
    return {unit.name: float(draw) for unit, draw in zip(denoiser.units, draws, strict=True)}


CRITERIA: dict[str, Callable[[Denoiser, Calibration, Mapping[str, Cut], int], Scores]] = {
    "magnitude": magnitude,
    "taylor": taylor,
    "block_influence": block_influence,
    "output_mse": output_mse,
    "random": random,
}


def criteria_of(denoiser: Denoiser, calibration: Calibration, cuts: Mapping[str, Cut], seed: int) -> dict[str, Scores]:
    """Criterion -> unit -> score; `cuts` are the bypasses of single units."""
    return {name: criterion(denoiser, calibration, cuts, seed) for name, criterion in CRITERIA.items()}


def weights_of(denoiser: Denoiser, unit: Unit) -> list[Tensor]:
    """All parameters of a unit."""
    return [w for path in unit.modules for w in denoiser.model.get_submodule(path).parameters()]
