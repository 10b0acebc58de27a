"""VAE decoders as removable units and channels, whatever their class; the encoder beside them is never touched.

Units are the mid block with its attention (`M`) and every layer of an up block (`U.<block>.<layer>`), counted from
the latents to the pixels. A decoder without some of them, or with fewer channels, is a subclass of the stock class
whose config.json says what is gone (models/students.py); it lies and loads where the stock VAE did.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401 (a pipeline that names this module for its VAE looks its base class up)
from torch import Tensor, nn

from vdmini_core.models.decoder_rows import VAES, VAERow
from vdmini_core.models.graph import IllegalPlan, Unit, answering, config_of, empty, expand, first_argument, rebuild
from vdmini_core.models.loading import class_name, load_component
from vdmini_core.models.narrow import Kept, kept_weights, widths_of
from vdmini_core.models.removal import Rule
from vdmini_core.models.students import student_class

PREFIX = "decoder."
"""Of the decoder's modules inside the VAE, as `widths` in the config names them."""


class VAEDecoder:
    """The decoder of a VAE by units; called with latents as the denoiser has them, it answers clips."""

    def __init__(self, model: Any) -> None:
        self.model, self.row = model, row_of(model)
        if reason := self.row.refused(model):
            raise IllegalPlan(f"the decoder of this {type(model).__name__} cannot be compressed: {reason}")
        self.units = tuple(self._list_units())

    @property
    def decoder(self) -> Any:
        """The network itself, whose modules the units name."""
        return self.model.decoder

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser has them [B, C, T', h, w] -> clips [B, 3, T, H, W], about in [-1, 1]."""
        return decoded(self.model, latents)

    def _list_units(self) -> Iterator[Unit]:
        blocks = self.decoder.up_blocks
        if not isinstance(self.decoder.mid_block, NoMidBlock):
            yield Unit("M", "M", len(blocks), ("mid_block",))
        for index, block in enumerate(blocks):
            parts = [part for part in ("resnets", "attentions") if getattr(block, part, None)]
            for layer in range(len(block.resnets)):
                paths = tuple(f"up_blocks.{index}.{part}.{layer}" for part in parts)
                yield Unit(f"U.{index}.{layer}", f"U.{index}", len(blocks) - 1 - index, paths)

    def widths_through(self, unit: Unit) -> tuple[int, int]:
        """Channels that enter the unit and that leave it, read off its own convolutions."""
        module = self.decoder.get_submodule(unit.modules[0])
        layers = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d))]
        # In every class a ResBlock's first convolution reads its input, and `conv2` writes to the residual stream.
        last = [layer for name, layer in module.named_modules() if name.rpartition(".")[2] == "conv2"][-1]
        return layers[0].in_channels, int(last.out_channels)

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """A unit can go if the width that enters it is the one that leaves it; no rule joins two units."""
        rules = []
        for unit in self.units:
            entering, leaving = self.widths_through(unit)
            if entering != leaving:
                others = [other.name for other in self.units if other.block == unit.block and other != unit]
                instead = f"; remove {' or '.join(others)} instead" if others else ""
                reason = f"takes out {unit.name}, which changes the width {entering} -> {leaving}{instead}"
                rules.append(Rule({unit.name: 1}, 1, 1, lambda removed, reason=reason: reason))  # type: ignore[misc]
        return tuple(rules)

    @property
    def removable(self) -> tuple[str, ...]:
        """Units that can go."""
        stay = {name for rule in self.rules for name in rule.terms}
        return tuple(unit.name for unit in self.units if unit.name not in stay)

    def check(self, names: Iterable[str]) -> tuple[str, ...]:
        """The named units (or whole blocks) in order; IllegalPlan with the reason unless they can be removed."""
        removed = expand(names, self.units)
        for rule in self.rules:
            if not rule.holds(removed):
                raise IllegalPlan(f"removing {', '.join(removed)} {rule.broken(removed)}")
        if removed and "widths" in self.model.config:
            raise IllegalPlan("the decoder has lost channels already; remove its units first and its channels then")
        return removed

    @contextmanager
    def bypass(self, names: Iterable[str]) -> Iterator[None]:
        """Within the context the named units pass their input on; IllegalPlan where their width would not fit."""
        chosen = self.check(names)
        with ExitStack() as stack:
            for unit in self.units:
                for path in unit.modules if unit.name in chosen else ():
                    stack.enter_context(answering(self.decoder.get_submodule(path), first_argument))
            yield

    def without(self, names: Iterable[str]) -> "VAEDecoder":
        """A VAE whose decoder lacks the units, with its own copy of the weights; IllegalPlan where there is none."""
        removed = self.check(names)
        if not removed:
            return VAEDecoder(copy.deepcopy(self.model))
        copies: dict[int, Any] = {id(tensor): tensor for tensor in self.model.parameters()}
        skeleton = copy.deepcopy(self.model, memo=copies)
        delete_units(skeleton, set(removed))
        config = config_of(self.model)
        already = set(config.get("removed_units") or ())
        stock = {key: value for key, value in config.items() if key not in ("removed_units", "widths")}
        originals = [unit.name for unit in VAEDecoder(empty(self.row.stock, stock)).units if unit.name not in already]
        now = {original for original, unit in zip(originals, self.units, strict=True) if unit.name in removed}
        weights = {name: value.clone() for name, value in skeleton.state_dict().items()}
        return VAEDecoder(rebuild(STUDENTS[self.row.stock], {**stock, "removed_units": sorted(already | now)}, weights))

    def narrowed(self, kept: Kept) -> "VAEDecoder":
        """A VAE whose decoder's named layers have these channels alone, with its own copy of the weights."""
        inside = {PREFIX + path: channels for path, channels in kept.items()}
        config = config_of(self.model)
        config["widths"] = {**(config.get("widths") or {}), **widths_of(inside)}
        return VAEDecoder(rebuild(STUDENTS[self.row.stock], config, kept_weights(self.model, inside)))

    def with_weights(self, weights: Mapping[str, Tensor]) -> "VAEDecoder":
        """A frozen VAE with these weights of the decoder network; those of the encoder are shared with this one."""
        others = {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith(PREFIX)}
        inside = {PREFIX + name: tensor for name, tensor in weights.items()}
        return VAEDecoder(rebuild(type(self.model), config_of(self.model), others | inside))

    def on_meta(self) -> "VAEDecoder":
        """The same without weights, for counting."""
        return VAEDecoder(empty(type(self.model), config_of(self.model)).to("meta").eval())

    @property
    def levels(self) -> int:
        """Resolutions, from the latents' (0) to the pixels'; each up block has one."""
        return len(self.decoder.up_blocks)

    def level_of(self, path: str, *, inputs: bool = False) -> int:
        """The resolution at which a layer's outputs lie, or its inputs."""
        parts = path.split(".")
        if parts[0] in ("conv_in", "mid_block"):
            return 0
        if parts[0] != "up_blocks":
            return self.levels - 1
        return int(parts[1]) + int(parts[2] == "upsamplers" and not inputs)

    def layout(self) -> str:
        """What the decoder is made of in one line: mid block or none, layers of the up blocks and their widths."""
        blocks = [
            f"{len(block.resnets)} x {self._width_of(index)}" for index, block in enumerate(self.decoder.up_blocks)
        ]
        mid = "no mid" if isinstance(self.decoder.mid_block, NoMidBlock) else f"mid {self._width_of(0)}"
        return f"{mid}, up blocks {', '.join(blocks)}"

    def _width_of(self, block: int) -> int:
        """Channels of the residual stream where it leaves an up block's layers."""
        own = [unit for unit in self.units if unit.block == f"U.{block}"]
        if own:
            return self.widths_through(own[-1])[1]
        return self._width_of(block - 1) if block else int(self.decoder.conv_in.out_channels)


class NoMidBlock(nn.Module):
    """Stands where a decoder without mid block had one; passes its input on."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def delete_units(model: Any, removed: set[str]) -> None:
    """Take the units out of the VAE itself; what is left renumbers itself."""
    if not removed:
        return
    found = VAEDecoder(model)
    for unit in reversed(found.units):
        if unit.name in removed:
            for path in unit.modules:
                parent, _, name = path.rpartition(".")
                if unit.name == "M":
                    setattr(found.decoder, name, NoMidBlock())
                else:
                    del found.decoder.get_submodule(parent)[int(name)]
    found.row.after_removal(model)


VDMiniAutoencoderKLTemporalDecoder, VDMiniAutoencoderKL, VDMiniAutoencoderKLWan = (
    student_class(row.stock, f"VDMini{row.stock.__name__}", __name__, delete_units) for row in VAES
)
STUDENTS: dict[type[Any], type[Any]] = {
    cls.__mro__[1]: cls for cls in (VDMiniAutoencoderKLTemporalDecoder, VDMiniAutoencoderKL, VDMiniAutoencoderKLWan)
}
VAE_CLASSES = {cls.__name__: cls for pair in STUDENTS.items() for cls in pair}


def load_vae(stock: type[Any], folder: Path, device: torch.device | str = "cpu") -> Any:
    """A VAE of the stock class, or one of it with a compressed decoder, whichever its config names."""
    classes = {cls.__name__: cls for cls in (stock, STUDENTS[stock])}
    return load_component(classes[class_name(folder, classes)], folder).to(device)


def row_of(model: Any) -> VAERow:
    """How VAEs of the model's class are decoded; IllegalPlan for another class."""
    for row in VAES:
        if isinstance(model, row.stock):
            return row
    known = ", ".join(row.stock.__name__ for row in VAES)
    raise IllegalPlan(f"{type(model).__name__} is no VAE whose decoder can be compressed; these are {known}")


def decoded(model: Any, latents: Tensor) -> Tensor:
    """Latents as the denoiser has them [B, C, T', h, w] -> a VAE's clips [B, 3, T, H, W], about in [-1, 1]."""
    return row_of(model).decode(model, unscaled(model, latents))


def unscaled(model: Any, latents: Tensor) -> Tensor:
    """Latents as the denoiser has them -> as the VAE has them: by one factor, or by deviation and mean a channel."""
    if (factor := model.config.get("scaling_factor")) is not None:
        return latents / factor  # type: ignore[no-any-return]
    mean, std = latent_statistics(model, latents.device)
    return latents * std + mean


def latent_statistics(model: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a VAE's own latents, [C, 1, 1, 1], where they are scaled channel by channel."""
    mean, std = torch.tensor([model.config.latents_mean, model.config.latents_std], device=device)
    return mean[:, None, None, None], std[:, None, None, None]
