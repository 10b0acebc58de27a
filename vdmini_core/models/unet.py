"""Video U-Nets as block graphs; unet_rows.py lists the classes.

All have down blocks, a mid block and up blocks; an R-A pair is a ResBlock with what follows it (attention,
temporal convolution, motion module).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ModelMixin,  # noqa: F401 (a pipeline that names this module for its U-Net looks its base class up here)
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn

from vdmini_core.models.graph import (
    Condition,
    Denoiser,
    IllegalPlan,
    StandIns,
    Unit,
    config_of,
    empty,
    expand,
    first_argument,
    first_argument_in_tuple,
    rebuild,
)
from vdmini_core.models.loading import class_name, load_component
from vdmini_core.models.narrow import Kept, kept_weights, widths_of
from vdmini_core.models.removal import Piece, Rule
from vdmini_core.models.students import student_class
from vdmini_core.models.unet_rows import UNETS
from vdmini_core.models.unet_rules import Pair, Stage, unet_rules


class UNetDenoiser(Denoiser):
    """A video U-Net: units D.<stage>.<pair>, M, U.<stage>.<pair>."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.row = next(row for row in UNETS if isinstance(model, row.stock))
        self.stages = len(model.down_blocks)
        self.units = tuple(self._list_units())
        self._by_block: dict[str, list[Unit]] = {}
        for unit in self.units:
            self._by_block.setdefault(unit.block, []).append(unit)
        self.pieces = tuple(self._samplers(stage) for stage in range(1, self.stages))

    def __call__(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, T, h, w] as the network wants them scaled -> its answer, of the same shape."""
        return self.row.call(self.model, latents, time, condition)

    def _list_units(self) -> Iterator[Unit]:
        def pairs(block: Any, name: str, depth: int, path: str) -> Iterator[Unit]:
            for index in range(len(block.resnets)):
                parts = [part for part in self.row.parts if len(getattr(block, part, ())) > index]
                yield Unit(f"{name}.{index}", name, depth, tuple(f"{path}.{part}.{index}" for part in parts))

        for stage, block in enumerate(self.model.down_blocks):
            yield from pairs(block, f"D.{stage}", stage, f"down_blocks.{stage}")
        mid = self.model.mid_block
        if not isinstance(mid, NoMid):
            paths = [f"mid_block.{p}.{i}" for p in self.row.parts for i in range(len(getattr(mid, p, ())))]
            last = f"mid_block.{self.row.mid_tail}.{len(getattr(mid, self.row.mid_tail)) - 1}"
            yield Unit("M", "M", self.stages, (*(path for path in paths if path != last), last))
        for stage, block in enumerate(self.model.up_blocks):
            yield from pairs(block, f"U.{stage}", self.stages - 1 - stage, f"up_blocks.{stage}")

    def _facing(self, stage: int) -> tuple[str, str]:
        """The down and the up block of a stage."""
        return f"D.{stage}", f"U.{self.stages - 1 - stage}"

    def _samplers(self, stage: int) -> Piece:
        """What leads into a stage and out of it."""
        paths = f"down_blocks.{stage - 1}.downsamplers.0", f"up_blocks.{self.stages - 1 - stage}.upsamplers.0"
        return Piece(f"samplers.{stage}", tuple(unit.name for unit in self.units if unit.depth >= stage), paths)

    def _pairs_of(self, block: str) -> list[Unit]:
        return self._by_block.get(block, [])

    def _resnet(self, unit: Unit) -> Any:
        """The unit's (first) ResBlock, which knows its widths."""
        module = self.model.get_submodule(unit.modules[0])
        return getattr(module, "spatial_res_block", module)

    def _hidden_width(self, unit: Unit) -> int:
        """Channels of the hidden state (without a skip) that reaches the unit."""
        resnet = self._resnet(unit)
        if not unit.block.startswith("U"):
            return int(resnet.in_channels)
        before = self.units[self.units.index(unit) - 1]
        return int(self._resnet(before).out_channels)

    def identity_of(self, unit: Unit) -> Mapping[str, Callable[..., Any]]:
        """A ResBlock passes its hidden state on, through its own 1 x 1 shortcut where the width changes.

        An up pair whose width stays drops its skip, as physical removal would.
        """
        answers: dict[str, Callable[..., Any]] = {}
        for path in unit.modules:
            part = path.split(".")[-2]
            if part != "resnets":
                answers[path] = first_argument_in_tuple if part in self.row.unpacked else first_argument
            elif unit.block == "M":
                answers[path] = first_argument
            else:
                answers[path] = _shortcut(self._resnet(unit), self._hidden_width(unit))
        return answers

    def running_in_bypass(self, unit: Unit) -> tuple[str, ...]:
        """The shortcut of a pair between stages of different widths."""
        resnet = self._resnet(unit)
        if unit.block == "M" or self._hidden_width(unit) == int(resnet.out_channels):
            return ()
        nested = "spatial_res_block." if resnet is not self.model.get_submodule(unit.modules[0]) else ""
        return (f"{unit.modules[0]}.{nested}conv_shortcut",)

    def _silent(self, chosen: set[str], stand_ins: StandIns) -> dict[str, Callable[..., Any]]:
        """Also the samplers of inner stages that fall silent as a whole.

        Within them nothing changes the width either, if they give back the one they are given, or what would change
        it back, the pair after them, is silent too.
        """
        silent = super()._silent(chosen, stand_ins)
        gone = self._inner_stages(chosen)
        silent |= {path: first_argument for stage in gone for path in self.pieces[stage - 1].modules}
        if not gone:
            return silent
        width, outside = self._width_before(min(gone)), self._pairs_of(self._facing(min(gone) - 1)[1])[0]
        if width == self._width_before(min(gone) + 1) or outside.name in chosen:
            inner = [u for u in self.units if u.name in chosen and (u.depth >= min(gone) or u == outside)]
            paths = (path for unit in inner for path in unit.modules if path.split(".")[-2] == "resnets")
            silent |= {path: _leading(width) for path in paths}
        return silent

    def _width_before(self, stage: int) -> int:
        """Channels of the hidden state that enters a stage."""
        outer = [unit for unit in self.units if unit.depth < stage and unit.block.startswith("D")]
        return int(self._resnet(outer[-1]).out_channels if outer else self.model.conv_in.out_channels)

    def _inner_stages(self, removed: set[str]) -> list[int]:
        """Stages, deepest first, that go as a whole: every pair of theirs and everything deeper."""
        return [stage for stage in range(self.stages - 1, 0, -1) if removed.issuperset(self.pieces[stage - 1].units)]

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Each kept pair must receive what it was trained on; only so is removal the same as bypass."""

        def pairs(block: str) -> tuple[Pair, ...]:
            units = self._pairs_of(block)
            return tuple(Pair(u.name, self._hidden_width(u), int(self._resnet(u).out_channels)) for u in units)

        facing = [self._facing(stage) for stage in range(self.stages)]
        stages = [Stage(down, up, pairs(down), pairs(up)) for down, up in facing]
        return unet_rules(stages, "M" if self._pairs_of("M") else None)

    def trimmed(self, model: Any, removed: set[str]) -> tuple[type[Any], dict[str, Any]]:
        """A stock class where its config can say what is left, otherwise the subclass that lists what is gone."""
        if "widths" in self.model.config:
            raise IllegalPlan("the network has lost channels already; remove its units first and its channels then")
        delete_units(UNetDenoiser(model), removed)
        config = self._teacher_config()
        if type(self.model) is self.row.stock and not isinstance(model.mid_block, NoMid):
            stock = self._stock_config(model, config)
            if _shapes_of(self.row.stock, stock) == _shapes(model):
                return self.row.stock, stock
        already = set(config_of(self.model).get("removed_units") or ())
        originals = [
            unit.name for unit in UNetDenoiser(empty(self.row.stock, config)).units if unit.name not in already
        ]
        now = {original for original, unit in zip(originals, self.units, strict=True) if unit.name in removed}
        return STUDENTS[self.row.stock], {**config, "removed_units": sorted(already | now)}

    def _teacher_config(self) -> dict[str, Any]:
        """The config of the stock model that this one was made from, or is."""
        return {key: value for key, value in config_of(self.model).items() if key != "removed_units"}

    def _stock_config(self, model: Any, config: dict[str, Any]) -> dict[str, Any]:
        """The stock class's config for what is left of `model`, if there is one."""
        stages, layers = len(model.down_blocks), tuple(len(block.resnets) for block in model.down_blocks)
        changed: dict[str, Any] = {"layers_per_block": layers[0] if len(set(layers)) == 1 else layers}
        for key, value in config.items():
            per_stage = isinstance(value, (list, tuple)) and len(value) == self.stages
            if per_stage and key not in ("layers_per_block", "sample_size"):
                from_the_end = key == "up_block_types" or key.startswith("reverse_")
                changed[key] = tuple(value)[self.stages - stages :] if from_the_end else tuple(value)[:stages]
        return {**config, **changed}

    def narrowed(self, kept: Kept) -> "UNetDenoiser":
        """A new network with its own copy of the weights, in which the named layers have these channels alone."""
        config = config_of(self.model)
        config["widths"] = {**config.get("widths", {}), **widths_of(kept)}
        return UNetDenoiser(rebuild(STUDENTS[self.row.stock], config, kept_weights(self.model, kept)))

    def stock_form(self) -> Any:
        """The same function as a model of the stock class, or None where its config cannot say it.

        A U-Net without a mid block gets one that is an exact identity: all its weights are zero, so
        every residual branch ends in nothing. The other weights are shared with this network.
        """
        if type(self.model) is self.row.stock:
            return self.model
        if "widths" in self.model.config:
            return None
        config = self._teacher_config()
        if config.get("mid_block_scale_factor", 1) != 1:  # the mid block would divide what it passes on
            return None
        stock = UNetDenoiser(empty(self.row.stock, config))._stock_config(self.model, config)
        if (shapes := _shapes_of(self.row.stock, stock)) is None:
            return None
        weights = self.model.state_dict()
        lacking = {name: shapes.pop(name) for name in shapes.keys() - weights.keys()}
        if shapes != _shapes(self.model) or not all(name.startswith("mid_block.") for name in lacking):
            return None
        some = next(iter(weights.values()))
        return rebuild(self.row.stock, stock, weights | {name: some.new_zeros(size) for name, size in lacking.items()})

    def surviving(self, names: Iterable[str]) -> dict[str, str]:
        """Teacher unit -> student unit for every unit kept when `names` are removed."""
        removed = set(expand(names, self.units))
        gone = len(self._inner_stages(removed))
        matches: dict[str, str] = {}
        counters: dict[str, int] = {}
        for unit in self.units:
            if unit.name in removed:
                continue
            side, _, stage = unit.block.partition(".")
            block = f"U.{int(stage) - gone}" if side == "U" else unit.block
            index = counters.get(block, 0)
            counters[block] = index + 1
            matches[unit.name] = "M" if side == "M" else f"{block}.{index}"
        return matches

    def _stage_removals(self, unit: Unit) -> list[tuple[str, ...]]:
        """The unit with all of its stage and everything deeper, for every stage that is deep enough."""
        removals = []
        for stage in range(self.stages - 1, 0, -1):
            inner = [u.name for u in self.units if u.depth >= stage and u.name != unit.name]
            if unit.depth >= stage:
                removals.append(tuple(inner))
        return removals

    def encoder_stages(self) -> list[nn.Module]:
        """The down blocks, outermost first."""
        return list(self.model.down_blocks)

    def encoder_widths(self) -> list[int]:
        """Channels of the down blocks' outputs."""
        return [int(width) for width in self.model.config.block_out_channels[: self.stages]]

    def stop_after_encoder(self) -> nn.Module:
        """The mid block, or what stands in its place."""
        return self.model.mid_block  # type: ignore[no-any-return]

    def as_video(self, feature: Tensor, latents: Tensor) -> Tensor:
        """Features have the frames folded into the batch: [B * T, C, h, w] -> [B, C, T, h, w]."""
        video: Tensor = feature.unflatten(0, (-1, latents.shape[2])).transpose(1, 2)
        return video


class NoMid(nn.Module):
    """Stands where a U-Net without mid block had one; passes its input on."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def delete_units(denoiser: UNetDenoiser, removed: set[str]) -> None:
    """Take the units out of the model itself; what is left renumbers itself."""
    model = denoiser.model
    gone = denoiser._inner_stages(removed)
    for unit in reversed(denoiser.units):
        if unit.name in removed and unit.block != "M":
            for path in unit.modules:
                parent, _, index = path.rpartition(".")
                del model.get_submodule(parent)[int(index)]
    if "M" in removed:
        model.mid_block = NoMid()
    if gone:
        del model.down_blocks[min(gone) :]
        del model.up_blocks[: len(gone)]
        model.down_blocks[-1].downsamplers = None
        if hasattr(model, "num_upsamplers"):
            model.num_upsamplers -= len(gone)


def _delete(model: Any, removed: set[str]) -> None:
    delete_units(UNetDenoiser(model), removed)


VDMiniUNet = student_class(UNetSpatioTemporalConditionModel, "VDMiniUNet", __name__, _delete)
VDMiniUNet3D = student_class(UNet3DConditionModel, "VDMiniUNet3D", __name__, _delete)
VDMiniUNetMotion = student_class(UNetMotionModel, "VDMiniUNetMotion", __name__, _delete)
STUDENTS: dict[type[Any], type[Any]] = {cls.__mro__[1]: cls for cls in (VDMiniUNet, VDMiniUNet3D, VDMiniUNetMotion)}


UNET_CLASSES = {cls.__name__: cls for row in UNETS for cls in (row.stock, STUDENTS[row.stock])}


def load_unet(folder: Path, device: torch.device | str = "cpu") -> UNetDenoiser:
    """Load a stock U-Net or a student's, whichever its config names."""
    return UNetDenoiser(load_component(UNET_CLASSES[class_name(folder, UNET_CLASSES)], folder).to(device))


def _shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _shapes_of(cls: type[Any], config: Mapping[str, Any]) -> dict[str, torch.Size] | None:
    """The tensors of the class so configured, or None where it does not take the config."""
    try:
        return _shapes(empty(cls, config))
    except (ValueError, TypeError, NotImplementedError):
        return None


def _shortcut(resnet: Any, hidden_width: int) -> Callable[..., Tensor]:
    """What a ResBlock without its residual branch passes on.

    The hidden part of its input, if its width is the block's own; else its 1 x 1 shortcut of all of it.
    """

    if hidden_width == resnet.out_channels:
        return _leading(hidden_width)
    return lambda *args, **named: resnet.conv_shortcut(first_argument(*args, **named))


def _leading(width: int) -> Callable[..., Tensor]:
    """The first `width` channels of the input: the hidden state without the skip that is joined to it."""
    return lambda *args, **named: first_argument(*args, **named)[:, :width]
