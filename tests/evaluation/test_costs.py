"""What networks cost: FLOPs against counts by hand, and how latency is taken."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import FRAMES, LATENT_SIZE, new_inputs
from vdmini_core.evaluation import costs
from vdmini_core.evaluation.costs import count_costs, elapsed_ms, measure_latencies, measure_units
from vdmini_core.models import Condition, UNetDenoiser

Inputs = tuple[Tensor, Condition]
CPU = torch.device("cpu")


def attention_flops(tokens: int, keys: int, sequences: int, width: int) -> int:
    """Scores and weighted sum: 2 * tokens * keys * width each."""
    return sequences * 2 * (2 * tokens * keys * width)


def linear_flops(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs


def test_a_transformers_flops_are_those_counted_by_hand(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    counted = count_costs(tiny_unet, *inputs)
    width, context, hidden, places = 32, 16, 128, LATENT_SIZE**2
    tokens = FRAMES * places
    # Three feed-forwards (gated: two up, one down) and four attentions; time is embedded by two layers.
    feed_forward = 3 * (linear_flops(tokens, width, 2 * hidden) + linear_flops(tokens, hidden, width))
    self_projections = 2 * 4 * linear_flops(tokens, width, width)
    # The spatial cross attention sees one embedding a frame; the temporal one sees one a place.
    cross_projections = 2 * 2 * linear_flops(tokens, width, width)
    cross_projections += 2 * linear_flops(FRAMES, context, width) + 2 * linear_flops(places, context, width)
    attention = attention_flops(places, places, FRAMES, width) + attention_flops(FRAMES, FRAMES, places, width)
    attention += 2 * attention_flops(1, 1, tokens, width)
    ends = 2 * linear_flops(tokens, width, width)
    embedding = 2 * linear_flops(FRAMES, width, 4 * width)
    expected = feed_forward + self_projections + cross_projections + attention + ends + embedding

    convolutions = 4 * 2 * tokens * width * width  # 3 x 3 and 3 x 1 x 1 kernels, two of each
    resnet = (9 + 3) * convolutions // 2 + 2 * linear_flops(FRAMES, 4 * width, width)
    assert counted.unit_flops["D.0.0"] == expected + resnet


def test_the_first_convolution_is_counted_as_by_hand(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    counted = count_costs(tiny_unet, *inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny_unet.model.conv_in(torch.zeros(FRAMES, 8, LATENT_SIZE, LATENT_SIZE))
    convolution = 2 * FRAMES * LATENT_SIZE**2 * 8 * 32 * 9
    assert counter.get_total_flops() == convolution
    assert sum(counted.unit_flops.values()) + convolution < counted.flops


def test_attention_grows_with_the_square_of_the_places(tiny_unet: UNetDenoiser) -> None:
    small, large = (count_costs(tiny_unet, *new_inputs(size=size)) for size in (8, 16))
    with_attention, without = "D.0.0", "D.3.0"
    assert large.unit_flops[with_attention] > 4.05 * small.unit_flops[with_attention]
    assert large.unit_flops[without] < 4.0 * small.unit_flops[without]


def test_counting_is_the_same_twice_and_costs_the_network_nothing(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    first = count_costs(tiny_unet, *inputs)
    assert count_costs(tiny_unet, *inputs) == first
    assert first.parameters == sum(p.numel() for p in tiny_unet.model.parameters())
    assert sum(first.unit_parameters.values()) < first.parameters
    assert {p.device.type for p in tiny_unet.model.parameters()} == {"cpu"}


def test_latencies_are_taken_in_turn_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = measure_latencies(calls, CPU, runs=3, warmup=2)
    assert "".join(order) == "ab" * 5
    assert {name: latency.runs for name, latency in found.items()} == {"a": 3, "b": 3}
    assert all(latency.p10_ms <= latency.median_ms <= latency.p90_ms for latency in found.values())


def test_a_single_run_is_its_own_median() -> None:
    latency = measure_latencies({"": lambda: None}, CPU, runs=1, warmup=0)[""]
    assert latency.p10_ms == latency.median_ms == latency.p90_ms
    assert latency.runs == 1


class FakeEvent:
    """Stands in for a CUDA event on a device whose clock runs 5 ms from one record to the next."""

    clock_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "the stream of cuda:1"
        FakeEvent.clock_ms += 5
        self.at_ms = FakeEvent.clock_ms

    def elapsed_time(self, later: "FakeEvent") -> float:
        return later.at_ms - self.at_ms


def test_on_cuda_the_devices_own_clock_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda:1")
    assert elapsed_ms(lambda: None, device) == 5
    assert waited == [device, device]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_events_see_all_of_the_queued_work() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)

    def ten_products() -> None:
        for _ in range(10):
            x @ x

    latency = measure_latencies({"": ten_products}, device, runs=3, warmup=2)[""]
    assert latency.median_ms > 10 * 2 * 4096**3 / 2e15 * 1000  # no device does 2 PFLOP/s in float32


def test_the_time_of_parts_is_that_of_the_faster_half_of_the_calls(
    tiny_unet: UNetDenoiser, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_ms = iter([9.0, 50.0, 5.0, 7.0, 60.0])

    def timed(call: Callable[[], object], device: torch.device) -> float:
        call()
        return next(whole_ms)

    monkeypatch.setattr(costs, "elapsed_ms", timed)
    stages = []
    for path in (path for piece in tiny_unet.pieces for path in piece.modules):
        sampler, stage = (tiny_unet.model.get_submodule(path.rsplit(".", up)[0]) for up in (0, 2))
        monkeypatch.setattr(sampler, "forward", lambda value: value)
        monkeypatch.setattr(stage, "forward", sampler.__call__)
        stages.append(stage)
    monkeypatch.setattr(UNetDenoiser, "__call__", lambda unet, *args: [stage(None) for stage in stages])
    clock = iter(range(10**6))
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock) / 1000)
    found = costs.measure_parts(tiny_unet, *inputs, runs=5, warmup=0)
    assert found.whole_ms == (5 + 7 + 9) / 3
    assert [found.parts[piece.name] for piece in tiny_unet.pieces] == pytest.approx([2.0, 2.0, 2.0])
    assert found.parts["M"] == 0


def test_what_a_stage_does_before_a_part_is_the_parts(
    tiny_unet: UNetDenoiser, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tiny_unet.model.up_blocks[-1]
    forward, joined = stage.forward, 0.5  # far above what a unit takes on a busy machine

    def slower(*args: object, **named: object) -> object:
        time.sleep(joined)
        return forward(*args, **named)

    monkeypatch.setattr(stage, "forward", slower)
    spent = measure_units(tiny_unet, *inputs, runs=1, warmup=0)
    first = next(unit.name for unit in tiny_unet.units if unit.block == tiny_unet.blocks[-1])
    assert spent[first] > joined * 1000 > spent[tiny_unet.units[-1].name]


def test_every_unit_gets_a_time_and_no_hook_stays(tiny_unet: UNetDenoiser, inputs: Inputs) -> None:
    spent = measure_units(tiny_unet, *inputs, runs=1, warmup=0)
    assert list(spent) == [unit.name for unit in tiny_unet.units]
    assert min(spent.values()) > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_unet.model.modules())
