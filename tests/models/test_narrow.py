"""Networks that lost channels: the same function where the channels did nothing, and the same after reloading."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import EVEN, GROWING, new_inputs, new_unet, output_of
from vdmini_core.models import IllegalPlan, UNetDenoiser, load_denoiser
from vdmini_core.models.narrow import Kept, all_channels, narrow, parameters_with, widths_of
from vdmini_core.pruning.surgery import save_model

RESNET = "up_blocks.2.resnets.1.spatial_res_block"


def without_hidden(denoiser: UNetDenoiser, gone: list[int]) -> Kept:
    """One ResBlock without some of its hidden channels, and everything that reads or writes them."""
    get = denoiser.model.get_submodule
    hidden = torch.tensor([c for c in range(get(f"{RESNET}.conv1").out_channels) if c not in gone])
    inputs, outputs = all_channels(get(f"{RESNET}.conv1"))[1], all_channels(get(f"{RESNET}.conv2"))[0]
    return {
        f"{RESNET}.conv1": (hidden, inputs),
        f"{RESNET}.time_emb_proj": (hidden, all_channels(get(f"{RESNET}.time_emb_proj"))[1]),
        f"{RESNET}.norm2": (hidden,),
        f"{RESNET}.conv2": (outputs, hidden),
    }


@torch.no_grad()
def silence(denoiser: UNetDenoiser, gone: list[int]) -> None:
    """Make the hidden channels of that ResBlock answer zero after their norm."""
    for name in ("norm2.weight", "norm2.bias"):
        denoiser.model.get_parameter(f"{RESNET}.{name}")[gone] = 0.0


@pytest.fixture
def growing() -> UNetDenoiser:
    return new_unet(GROWING)


def test_channels_that_do_nothing_can_go_without_a_trace(growing: UNetDenoiser) -> None:
    gone = [4, 5, 40, 41]  # two whole normalisation groups of two
    silence(growing, gone)
    before = output_of(growing, new_inputs())
    narrowed = growing.narrowed(without_hidden(growing, gone))
    torch.testing.assert_close(output_of(narrowed, new_inputs()), before, rtol=0, atol=1e-5)
    norm = narrowed.model.get_submodule(f"{RESNET}.norm2")
    assert (norm.num_channels, norm.num_groups) == (60, 30)
    assert narrowed.model.get_submodule(f"{RESNET}.conv1").bias.data_ptr() not in {
        parameter.data_ptr() for parameter in growing.model.parameters()
    }


def test_a_narrowed_network_reloads_from_safetensors_with_its_list_of_widths(
    growing: UNetDenoiser, tmp_path: Path
) -> None:
    kept = without_hidden(growing, [0, 1])
    narrowed = growing.narrowed(kept)
    save_model(narrowed, tmp_path / "denoiser")
    assert sorted(path.suffix for path in (tmp_path / "denoiser").iterdir()) == [".json", ".safetensors"]
    assert json.loads((tmp_path / "denoiser/config.json").read_text())["widths"] == widths_of(kept)
    loaded = load_denoiser(tmp_path / "denoiser")
    weights = narrowed.model.state_dict()
    assert all(torch.equal(value, weights.pop(name)) for name, value in loaded.model.state_dict().items())
    assert not weights
    torch.testing.assert_close(output_of(loaded, new_inputs()), output_of(narrowed, new_inputs()), rtol=0, atol=1e-5)
    assert [unit.name for unit in loaded.units] == [unit.name for unit in growing.units]


def test_parameters_are_counted_from_the_widths_alone(growing: UNetDenoiser) -> None:
    kept = without_hidden(growing, [0, 1, 2, 3, 8, 9])
    narrowed = growing.narrowed(kept)
    counted = sum(parameter.numel() for parameter in narrowed.model.parameters())
    assert parameters_with(growing.model, widths_of(kept)) == counted
    assert counted < sum(parameter.numel() for parameter in growing.model.parameters())


def test_channels_go_after_units_and_in_two_steps(growing: UNetDenoiser) -> None:
    fewer = growing.without(("D.0.1", "U.3.1"))
    gone = [4, 5]
    silence(fewer, gone)
    once = fewer.narrowed(without_hidden(fewer, gone))
    torch.testing.assert_close(output_of(once, new_inputs()), output_of(fewer, new_inputs()), rtol=0, atol=1e-5)
    silence(once, [10, 11])
    twice = once.narrowed(without_hidden(once, [10, 11]))
    torch.testing.assert_close(output_of(twice, new_inputs()), output_of(once, new_inputs()), rtol=0, atol=1e-5)


def test_units_go_before_channels(growing: UNetDenoiser) -> None:
    narrowed = growing.narrowed(without_hidden(growing, [0, 1]))
    with pytest.raises(IllegalPlan, match="remove its units first"):
        narrowed.without(("D.0.1", "U.3.1"))
    assert narrowed.stock_form() is None


def test_a_network_that_lost_units_alone_says_nothing_of_widths() -> None:
    assert "widths" not in new_unet(EVEN).without(("M",)).model.config


@pytest.mark.parametrize(
    ("widths", "told"),
    [
        ({f"{RESNET}.norm2": [61]}, "61 channels; expected a multiple of its group size 2"),
        ({"nowhere.conv": [4, 4]}, "nowhere.conv, which"),
    ],
)
def test_widths_that_fit_no_layer_are_refused(growing: UNetDenoiser, widths: dict[str, list[int]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        narrow(growing.model, widths)


def test_a_module_without_channels_is_no_layer() -> None:
    with pytest.raises(TypeError, match="SiLU has no channels"):
        all_channels(torch.nn.SiLU())


def test_every_channel_is_the_network_itself(growing: UNetDenoiser) -> None:
    layers = {
        path: module for path, module in growing.model.named_modules() if path.endswith(("conv1", "norm1", "to_q"))
    }
    whole: dict[str, tuple[Tensor, ...]] = {path: all_channels(module) for path, module in layers.items()}
    assert torch.equal(output_of(growing.narrowed(whole), new_inputs()), output_of(growing, new_inputs()))
