"""What a network and each of its units cost: parameters, FLOPs (meta device), measured latency."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vdmini_core.artifacts import Cost, CostTable, Latency
from vdmini_core.models import Condition, Denoiser, Unit
from vdmini_core.models.removal import Piece
from vdmini_core.models.shared_start import Cut

RATIO_RUNS = 30
"""Timed runs of each side without which no ratio of latencies is given."""


@dataclass(frozen=True)
class Costs:
    """Of the whole network, of each unit, of each piece that goes with the last of some units, by their names.

    `module_flops` are per path of a module, those without any left out.
    """

    parameters: int
    flops: int
    unit_parameters: dict[str, int]
    unit_flops: dict[str, int]
    piece_parameters: dict[str, int]
    piece_flops: dict[str, int]
    module_flops: dict[str, int]

    def table(self, latencies: "PartLatencies | None" = None) -> CostTable:
        """The same as a record, with what was measured of latency."""
        parameters, flops = self.unit_parameters | self.piece_parameters, self.unit_flops | self.piece_flops
        spent = latencies.parts if latencies else {}
        return CostTable(
            whole=Cost(
                parameters=self.parameters, flops=self.flops, latency_ms=latencies.whole_ms if latencies else None
            ),
            parts={
                name: Cost(parameters=parameters[name], flops=flops[name], latency_ms=spent.get(name))
                for name in parameters
            },
        )


class PartLatencies(NamedTuple):
    """Milliseconds of a whole call, and of each unit and piece within it, which add up to less than it."""

    whole_ms: float
    parts: dict[str, float]


def count_costs(denoiser: Denoiser, latents: Tensor, condition: Condition) -> Costs:
    """Parameters, and FLOPs of one call with these inputs (2 per multiply-add, attention included).

    Counted on the meta device, where attention is not fused away from the counter.
    """
    model = denoiser.model
    twin = denoiser.on_meta()
    meta = {key: value.to("meta") for key, value in condition.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(latents.to("meta"), torch.ones(len(latents), device="meta"), meta)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    prefix = f"{type(twin.model).__name__}."

    def flops_of(parts: Iterable[Unit | Piece]) -> dict[str, int]:
        return {part.name: sum(counts.get(prefix + path, 0) for path in part.modules) for part in parts}

    return Costs(
        parameters=sum(p.numel() for p in model.parameters()),
        flops=counter.get_total_flops(),
        unit_parameters=unit_parameters(denoiser),
        unit_flops=flops_of(denoiser.units),
        piece_parameters=_parameters(denoiser, denoiser.pieces),
        piece_flops=flops_of(denoiser.pieces),
        module_flops={name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)},
    )


def count_call(call: Callable[[], object]) -> int:
    """FLOPs of a call that is made for it, where it runs: 2 per multiply-add, attention included.

    Attention is computed step by step meanwhile, because the fused kernels of a CPU are counted as nothing.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return int(counter.get_total_flops())


def flops_without(denoiser: Denoiser, costs: Costs, cut: Cut) -> tuple[int, int]:
    """FLOPs of a call with the cut's units bypassed: in full, and where it starts after the cut's prefix."""
    of = costs.module_flops
    chosen = [unit for unit in denoiser.units if {unit.name, unit.block} & set(cut.names)]
    silent = sum(of.get(path, 0) for path in denoiser.silent_modules(cut.names))
    # What stands in is as large as the shortcut in whose place it answers.
    still = sum(of.get(path, 0) for unit in chosen for path in denoiser.running_in_bypass(unit))
    full = costs.flops - silent + still
    return full, full - sum(of.get(path, 0) for path in cut.prefix)


def unit_parameters(denoiser: Denoiser) -> dict[str, int]:
    """Parameters of every unit by name."""
    return _parameters(denoiser, denoiser.units)


def _parameters(denoiser: Denoiser, parts: Iterable[Unit | Piece]) -> dict[str, int]:
    modules = {part.name: map(denoiser.model.get_submodule, part.modules) for part in parts}
    return {name: sum(p.numel() for part in parts for p in part.parameters()) for name, parts in modules.items()}


def synchronise(device: torch.device) -> None:
    """Wait for the device's queued work, so that a clock reads the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds from the call's start to the end of the work it queued: the device's own clock on CUDA."""
    synchronise(device)
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    first.record(stream)
    call()
    last.record(stream)
    synchronise(device)
    return float(first.elapsed_time(last))


def measure_latencies(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, runs: int, warmup: int
) -> dict[str, Latency]:
    """Time several calls in turn, see `time_in_turn`."""
    samples = time_in_turn(calls, device, runs=runs, warmup=warmup)
    return {name: latency_of(values) for name, values in samples.items()}


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, runs: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of several calls in turn (A B C A B C ...), so that a drifting machine bears on all alike."""
    samples: dict[str, list[float]] = defaultdict(list)
    for run in range(warmup + runs):
        for name, call in calls.items():
            spent = elapsed_ms(call, device)
            if run >= warmup:
                samples[name].append(spent)
    return dict(samples)


def latency_of(values: list[float]) -> Latency:
    """Median and outer deciles of timed calls, in milliseconds."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return Latency(median_ms=statistics.median(values), p10_ms=deciles[0], p90_ms=deciles[8], runs=len(values))


def speedup(teacher: Latency, student: Latency) -> float | None:
    """Teacher's median over the student's; None where either is of fewer than RATIO_RUNS runs, which prove nothing."""
    return teacher.median_ms / student.median_ms if min(teacher.runs, student.runs) >= RATIO_RUNS else None


def measure_units(
    denoiser: Denoiser, latents: Tensor, condition: Condition, *, runs: int, warmup: int = 2
) -> dict[str, float]:
    """Milliseconds spent inside each unit during whole forward calls, see `measure_parts`."""
    spent = measure_parts(denoiser, latents, condition, runs=runs, warmup=warmup).parts
    return {unit.name: spent[unit.name] for unit in denoiser.units}


def measure_parts(
    denoiser: Denoiser, latents: Tensor, condition: Condition, *, runs: int, warmup: int = 2
) -> PartLatencies:
    """Milliseconds of whole forward calls, and of each unit and piece during them, each waited for.

    What a stage does before a part, such as joining it to a skip connection, goes with the part, and is the part's.
    Means over the faster half of the calls: medians of parts would not add up on a machine that is busy now and then.
    """
    device = next(denoiser.model.parameters()).device
    parts: list[Unit | Piece] = [*denoiser.units, *denoiser.pieces]
    found: list[PartLatencies] = []
    since: dict[str, float] = {}
    total: dict[str, float] = defaultdict(float)

    def entering(stage: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object) -> None:
            synchronise(device)
            since[stage] = time.perf_counter()

        return hook

    def after(name: str, stage: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            synchronise(device)
            now = time.perf_counter()
            total[name] += (now - since[stage]) * 1000
            since[stage] = now

        return hook

    times = torch.zeros(len(latents), device=device)
    handles = []
    stages: dict[str, nn.Module] = {}
    for part in parts:
        for path in part.modules:
            module, stage = denoiser.model.get_submodule(path), path.rsplit(".", 2)[0]
            if stage == path or isinstance(denoiser.model.get_submodule(stage), nn.ModuleList):
                stage, holder = path, module  # the part is called by the model itself, not by a stage
            else:
                holder = denoiser.model.get_submodule(stage)
            stages[stage] = holder
            handles.append(module.register_forward_hook(after(part.name, stage)))
    handles += [holder.register_forward_pre_hook(entering(stage)) for stage, holder in stages.items()]
    try:
        with torch.no_grad():
            for run in range(warmup + runs):
                total.clear()
                milliseconds = elapsed_ms(lambda: denoiser(latents, times, condition), device)
                if run >= warmup:
                    found.append(PartLatencies(milliseconds, {part.name: total[part.name] for part in parts}))
    finally:
        for handle in handles:
            handle.remove()
    return mean_of_faster_half(found)


def mean_of_faster_half(calls: Sequence[PartLatencies]) -> PartLatencies:
    """Whole and parts of the same calls, those that took no longer than the median one."""
    fast = sorted(calls, key=lambda call: call.whole_ms)[: (len(calls) + 1) // 2]
    parts = {name: statistics.fmean(call.parts[name] for call in fast) for name in fast[0].parts}
    return PartLatencies(statistics.fmean(call.whole_ms for call in fast), parts)
