"""Narrower networks: layers that lost channels, as a list of widths and the weights that are left.

A list of widths is JSON: module path -> [outputs, inputs] of a convolution or linear layer, [channels] of a norm. With
it in the config a network saves and reloads like any other, in safetensors.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

Kept = Mapping[str, tuple[Tensor, ...]]
"""Module path -> indices of the channels that stay, in order: (outputs, inputs), or (channels,) of a norm."""

Widths = Mapping[str, Sequence[int]]

NORMS = (nn.GroupNorm, nn.LayerNorm, WanRMS_norm)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def widths_of(kept: Kept) -> dict[str, list[int]]:
    """The list of widths that the channels make."""
    return {path: [len(indices) for indices in sides] for path, sides in kept.items()}


def width_of(module: nn.Module) -> list[int]:
    """A layer's or norm's entry in a list of widths; TypeError for another kind of module."""
    if not isinstance(module, (*NORMS, *LAYERS)):
        raise TypeError(f"{type(module).__name__} has no channels that can be listed; expected a layer or a norm")
    weight = module.gamma if isinstance(module, WanRMS_norm) else module.weight
    assert isinstance(weight, Tensor)
    return list(weight.shape[: 1 if isinstance(module, NORMS) else 2])


def all_channels(module: nn.Module) -> tuple[Tensor, ...]:
    """Every channel of a layer or norm, as `Kept` has them."""
    return tuple(torch.arange(size) for size in width_of(module))


def kept_weights(model: nn.Module, kept: Kept) -> dict[str, Tensor]:
    """The model's state dict with those channels alone; copies."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for path, (first, *others) in kept.items():
        for name in (f"{path}.weight", f"{path}.bias", f"{path}.gamma"):
            if name in weights:
                weights[name] = weights[name].index_select(0, first.to(weights[name].device))
        for inputs in others:
            name = f"{path}.weight"
            weights[name] = weights[name].index_select(1, inputs.to(weights[name].device))
    return weights


def parameters_with(model: nn.Module, widths: Widths) -> int:
    """How many parameters the model has with these widths."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for path, sizes in widths.items():
        for parameter in model.get_submodule(path).parameters(recurse=False):
            total += math.prod(_shape(parameter, sizes)) - parameter.numel()
    return total


def narrow(model: Any, widths: Widths) -> None:
    """Give the layers these widths, in place; the new parameters hold no values yet.

    A GroupNorm keeps the size of its groups and loses some of them, so what is left is normalised as before.
    ValueError where a width is no whole number of them, or a layer is not there.
    """
    for path, sizes in widths.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"widths names {path}, which {type(model).__name__} does not have") from None
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = parameter.new_empty(_shape(parameter, sizes))
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        if isinstance(module, nn.GroupNorm):
            size = module.num_channels // module.num_groups
            if sizes[0] % size:
                raise ValueError(
                    f"widths gives {path} {sizes[0]} channels; expected a multiple of its group size {size}"
                )
            module.num_channels, module.num_groups = sizes[0], sizes[0] // size
        elif isinstance(module, WanRMS_norm):
            module.scale = sizes[0] ** 0.5
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = (sizes[0],)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = sizes
        else:
            module.out_channels, module.in_channels = sizes
    for module in model.modules():  # what diffusers notes beside its layers, and checks
        if isinstance(module, (ResnetBlock2D, TemporalResnetBlock)):
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
        elif isinstance(module, (Downsample2D, Upsample2D)) and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels


def _shape(parameter: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    """The parameter's shape with its leading sizes replaced; a bias has the outputs alone."""
    return (*sizes, *parameter.shape[len(sizes) :]) if parameter.ndim >= len(sizes) else tuple(sizes[:1])
