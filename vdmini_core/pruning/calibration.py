"""Noised training clips on which criteria are computed and linear maps are fitted."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.evaluation.quality import noise_for
from vdmini_core.models import Condition, Denoiser, Pipeline
from vdmini_core.models.graph import StandIns, first_argument

SIGMA_MEAN, SIGMA_STD = 0.0, 1.4  # of ln(sigma), as the denoising task trains by default


@dataclass(frozen=True)
class CalibrationBatch:
    """What the network is asked, what it should answer, and the weight that makes its error that of a velocity."""

    noisy: Tensor
    time: Tensor
    target: Tensor
    weight: Tensor
    condition: Condition

    def answer(self, denoiser: Denoiser) -> Tensor:
        return denoiser(self.noisy, self.time, self.condition)

    def error(self, answer: Tensor, target: Tensor) -> Tensor:
        """Weighted mean squared error of each clip, [B]."""
        return (answer.float() - target.float()).square().flatten(1).mean(1) * self.weight


Calibration = tuple[CalibrationBatch, ...]


def calibrate(pipeline: Pipeline, data: LatentCache, clips: int, batch_size: int, seed: int) -> Calibration:
    """The first `clips` clips, each at a log-normal noise level of its own."""
    process, device = pipeline.process, pipeline.device
    sigmas = process.draw(clips, SIGMA_MEAN, SIGMA_STD, torch.Generator().manual_seed(seed)).to(device)
    batches = []
    for index, rows in enumerate(data.batches(clips, batch_size)):
        latents = rows["latents"].to(device)
        chosen = range(index * batch_size, index * batch_size + len(latents))
        # A draw of its own, so that no clip here has the noise that a clip is generated from.
        noise = noise_for(seed, chosen, latents.shape[1:], device, draw=1)
        sigma = sigmas[chosen.start : chosen.stop]
        batches.append(
            CalibrationBatch(
                noisy=process.noised(latents, noise, sigma),
                time=process.time(sigma),
                target=process.target(latents, noise, sigma),
                weight=process.velocity_weight(sigma),
                condition=condition_of(rows, device),
            )
        )
    return tuple(batches)


def tensor_of(answer: Any) -> Tensor:
    """The hidden state of what a module answers, alone or with others."""
    return answer if isinstance(answer, Tensor) else answer[0]


Watcher = Callable[[tuple[Any, ...], dict[str, Any], Tensor], None]
"""see(args, keywords, answer): what a unit was given, and the hidden state that it answered."""


@contextmanager
def watching(denoiser: Denoiser, watchers: Mapping[str, Watcher]) -> Iterator[None]:
    """Within the context each unit's watcher sees every call of the unit."""
    with ExitStack() as stack:
        for unit in denoiser.units:
            if unit.name in watchers:
                first, last = (denoiser.model.get_submodule(unit.modules[index]) for index in (0, -1))
                for handle in _hooks(first, last, watchers[unit.name]):
                    stack.callback(handle.remove)
        yield


def _hooks(first: nn.Module, last: nn.Module, see: Watcher) -> list[RemovableHandle]:
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.append((args, named))

    def after(module: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        see(*given.pop(), tensor_of(answer))

    return [first.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]


@torch.no_grad()
def fit_stand_ins(denoiser: Denoiser, calibration: Calibration) -> StandIns:
    """A linear map, with a constant, for every unit that changes the width: least squares of what it answers.

    It maps the channels that the unit receives, of one place in one frame, to those that it answers; of several as
    good the smallest, by the normal equations in float64.
    """
    fits = {unit.name: _Fit() for unit in denoiser.units if denoiser.running_in_bypass(unit)}
    if fits:
        with watching(denoiser, fits):
            for batch in calibration:
                batch.answer(denoiser)
    return {name: linear_map(fit.solution()) for name, fit in fits.items()}


class _Fit:
    """Sums x^T x and x^T y over the places of every call, x with a 1 at its end."""

    def __init__(self) -> None:
        self.square: Tensor | None = None
        self.product: Tensor | None = None

    def __call__(self, args: tuple[Any, ...], named: dict[str, Any], answer: Tensor) -> None:
        x, y = (_pixels(tensor) for tensor in (first_argument(*args, **named), answer))
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        self.square = x.T @ x if self.square is None else self.square + x.T @ x
        self.product = x.T @ y if self.product is None else self.product + x.T @ y

    def solution(self) -> Tensor:
        """[inputs + 1, outputs]."""
        assert self.square is not None
        assert self.product is not None
        found: Tensor = torch.linalg.lstsq(self.square.cpu(), self.product.cpu(), driver="gelsd").solution
        return found.float().to(self.square.device)


def _pixels(feature: Tensor) -> Tensor:
    """Frames [B * T, C, h, w] as rows [N, C] in float64."""
    return feature.movedim(1, -1).flatten(0, -2).double()


def linear_map(weight: Tensor) -> Callable[..., Tensor]:
    """The answer of a module that maps channels by `weight` [C + 1, C'], whose last row is the constant."""

    def answer(*args: Any, **named: Any) -> Tensor:
        x = first_argument(*args, **named)
        matrix = weight.to(x)
        mapped: Tensor = torch.nn.functional.linear(x.movedim(1, -1), matrix[:-1].T, matrix[-1])
        return mapped.movedim(-1, 1)

    return answer
