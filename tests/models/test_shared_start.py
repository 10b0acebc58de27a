"""Starting in the middle changes no answer, and calls what it says it calls."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.models.tiny_transformers import new_condition, new_latents, new_transformer
from tests.tiny import GROWING, new_inputs, new_unet
from vdmini_core.evaluation.costs import count_costs, flops_without
from vdmini_core.models import Condition, Denoiser
from vdmini_core.models.shared_start import Cut, SharedStart, find_cuts
from vdmini_core.pruning.calibration import linear_map

TRANSFORMER = "HunyuanVideoTransformer3DModel"
TIME = torch.full((2,), 0.3)


def of(name: str) -> tuple[Denoiser, Tensor, Condition]:
    if name == "U-Net":
        return new_unet(GROWING), *new_inputs(2)
    return new_transformer(name), new_latents(2), new_condition(2)


def cuts_of(denoiser: Denoiser, latents: Tensor, condition: Condition) -> dict[str, Cut]:
    names = dict.fromkeys([*denoiser.blocks, *(unit.name for unit in denoiser.units)])
    return {names[0]: cut for names, cut in find_cuts(denoiser, [(n,) for n in names], latents, condition).items()}


@pytest.mark.parametrize("name", ["U-Net", TRANSFORMER, "WanTransformer3DModel"])
@torch.no_grad()
def test_every_bypass_answers_exactly_what_it_answers_from_the_start(name: str) -> None:
    denoiser, latents, condition = of(name)
    cuts = cuts_of(denoiser, latents, condition)
    shared = SharedStart(denoiser, cuts.values())
    intact = shared.intact(latents, TIME, condition)
    for cut in list(cuts.values())[:: 4 if name == "U-Net" else 1]:
        with denoiser.bypass(cut.names):
            expected = denoiser(latents, TIME, condition)
        assert torch.equal(shared.without(cut)(latents, TIME, condition), expected)
        assert shared.calls[cut.names, True] == 1
    assert torch.equal(denoiser(latents, TIME, condition), intact)


@torch.no_grad()
def test_other_inputs_are_computed_from_the_start() -> None:
    denoiser, latents, condition = of("U-Net")
    cut = cuts_of(denoiser, latents, condition)["U.3.1"]
    shared = SharedStart(denoiser, [cut])
    shared.intact(latents, TIME, condition)
    other = {**condition, "image_embedding": condition["image_embedding"] + 1}
    for inputs in ((latents + 1, TIME, condition), (latents, TIME + 1, condition), (latents, TIME, other)):
        with denoiser.bypass(cut.names):
            expected = denoiser(*inputs)
        assert torch.equal(shared.without(cut)(*inputs), expected)
    assert shared.calls == {((), False): 1, (("U.3.1",), False): 3}


@torch.no_grad()
def test_nothing_bypassed_is_all_prefix() -> None:
    denoiser, latents, condition = of("U-Net")
    (cut,) = find_cuts(denoiser, [()], latents, condition).values()
    assert cut.prefix == ("",)


@pytest.mark.parametrize("names", ["D.1.0", "U.2"])
def test_the_flops_of_a_bypass_are_those_that_a_counter_counts(names: str) -> None:
    denoiser, latents, condition = of("U-Net")
    one, told = latents[:1], {key: value[:1] for key, value in condition.items()}
    stand_ins = {"D.1.0": linear_map(torch.zeros(33, 64))}
    (cut,) = find_cuts(denoiser, [(names,)], one, told, stand_ins).values()
    twin = denoiser.on_meta()
    inputs = one.to("meta"), torch.ones(1, device="meta"), {key: value.to("meta") for key, value in told.items()}
    shared = SharedStart(twin, [cut])
    counted = []
    with torch.no_grad():
        shared.record(*inputs)
        for from_the_start in (True, False):
            with FlopCounterMode(display=False) as counter:
                shared.replay(cut, *inputs, from_the_start=from_the_start)
            counted.append(counter.get_total_flops())
    assert flops_without(denoiser, count_costs(denoiser, one, told), cut) == tuple(counted)
    assert counted[1] < counted[0]
