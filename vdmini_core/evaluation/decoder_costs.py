"""What a VAE decoder and each of its parts cost: parameters, FLOPs on the meta device, time within whole calls."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vdmini_core.evaluation.costs import PartLatencies, elapsed_ms, mean_of_faster_half, synchronise
from vdmini_core.models.decoder import VAEDecoder

INPUT, OUTPUT = "in", "out"
OUTPUT_LAYERS = ("conv_norm_out", "norm_out", "conv_out", "time_conv_out")


def parts_of(decoder: VAEDecoder) -> dict[str, tuple[str, ...]]:
    """Part -> paths of its modules: every unit, `in`, `out`, and the upsampler of each block, `U.<block>.up`."""
    found = {unit.name: unit.modules for unit in decoder.units}
    found[INPUT] = ("conv_in",)
    for index, block in enumerate(decoder.decoder.up_blocks):
        if block.upsamplers:
            found[f"U.{index}.up"] = (f"up_blocks.{index}.upsamplers.0",)
    found[OUTPUT] = tuple(name for name in OUTPUT_LAYERS if getattr(decoder.decoder, name, None) is not None)
    return found


def part_parameters(decoder: VAEDecoder) -> dict[str, int]:
    """Parameters of every part."""
    return {
        name: sum(p.numel() for path in paths for p in decoder.decoder.get_submodule(path).parameters())
        for name, paths in parts_of(decoder).items()
    }


def decoder_parameters(decoder: VAEDecoder) -> int:
    """Parameters of the decoder, without the encoder beside it."""
    return sum(parameter.numel() for parameter in decoder.decoder.parameters())


def count_decoder(decoder: VAEDecoder, shape: tuple[int, ...]) -> tuple[int, dict[str, int]]:
    """FLOPs of decoding latents of this shape [B, C, T', h, w], two per multiply-add: in all, and of every part."""
    twin = decoder.on_meta()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.zeros(shape, device="meta"))
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    prefix = f"{type(twin.decoder).__name__}."
    parts = {name: sum(counts.get(prefix + path, 0) for path in paths) for name, paths in parts_of(decoder).items()}
    return int(counter.get_total_flops()), parts


@torch.no_grad()
def measure_decoders(
    decoders: Mapping[str, VAEDecoder], latents: Tensor, *, runs: int, warmup: int = 1
) -> dict[str, PartLatencies]:
    """Milliseconds of each decoder's whole calls and of its parts in them, which are waited for; calls alternate.

    Means over the faster half of the calls. Parts add up to less than the whole.
    """
    found: dict[str, list[PartLatencies]] = {name: [] for name in decoders}
    for run in range(warmup + runs):
        for name, decoder in decoders.items():
            timed = _timed(decoder, latents)
            if run >= warmup:
                found[name].append(timed)
    return {name: mean_of_faster_half(calls) for name, calls in found.items()}


def _timed(decoder: VAEDecoder, latents: Tensor) -> PartLatencies:
    device = latents.device
    since: dict[str, float] = {}
    total: dict[str, float] = defaultdict(float)

    def entering(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object) -> None:
            synchronise(device)
            since[path] = time.perf_counter()

        return hook

    def leaving(part: str, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            synchronise(device)
            total[part] += (time.perf_counter() - since[path]) * 1000

        return hook

    handles, parts = [], parts_of(decoder)
    for part, paths in parts.items():
        for path in paths:
            module = decoder.decoder.get_submodule(path)
            handles.append(module.register_forward_pre_hook(entering(path)))
            handles.append(module.register_forward_hook(leaving(part, path)))
    try:
        whole = elapsed_ms(lambda: decoder(latents), device)
    finally:
        for handle in handles:
            handle.remove()
    return PartLatencies(whole, {part: total[part] for part in parts})
