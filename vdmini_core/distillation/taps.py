"""Reads intermediate features out of a network without changing it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from vdmini_core.diffusion.process import Process
from vdmini_core.models import Condition, Denoiser


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


@contextmanager
def tapped(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within the context, every call of a named module leaves its output in the yielded dictionary."""
    found: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            found[name] = _tensor(output)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _EncoderDone(Exception):
    """Raised by the hook that ends a forward pass after the encoder."""


def encoder_features(denoiser: Denoiser, noisy: Tensor, time: Tensor, condition: Condition) -> list[Tensor]:
    """The output of every encoder stage, [B, C, T, h, w]; nothing after the encoder is computed."""

    def stop(module: nn.Module, args: object) -> None:
        raise _EncoderDone

    stages = {str(index): stage for index, stage in enumerate(denoiser.encoder_stages())}
    handle = denoiser.stop_after_encoder().register_forward_pre_hook(stop)
    try:
        with tapped(stages) as found, suppress(_EncoderDone):
            denoiser(noisy, time, condition)
    finally:
        handle.remove()
    return [denoiser.as_video(found[name], noisy) for name in stages]


def renoised_features(denoiser: Denoiser, process: Process, x0: Tensor, state: Mapping[str, Any]) -> list[Tensor]:
    """Multi-frame features of a frozen encoder for clips [B, C, T, h, w] re-noised to the step's sigma'."""
    sigma = state["heads_sigma"]
    noisy = process.noised(x0, state["heads_noise"], sigma)
    return encoder_features(denoiser, noisy, process.time(sigma), state["condition"])
