"""The block graph: a denoiser as removable units, named in the paper's vocabulary, whatever its class."""

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

Condition = dict[str, Tensor]
"""What a denoiser is told besides the noisy latents: named tensors with the clips in their first dimension."""

StandIns = Mapping[str, Callable[..., Any]]
"""Unit -> what its first module answers while the rest of it does nothing."""


class IllegalPlan(ValueError):
    """The removal would not leave a working model; the message says why and what to do instead."""


@dataclass(frozen=True)
class Unit:
    """The smallest piece that can be bypassed.

    `name` is `D.<stage>.<pair>`, `M` or `U.<stage>.<pair>` in a U-Net (R-A pairs: a ResBlock with its
    attention), `double.<i>`, `single.<i>` or `block.<i>` in a transformer; `block` is the name of the
    block it belongs to, its own where there is no larger one; `depth` counts stages from the
    outermost (0) in a U-Net, blocks from the input in a transformer; `modules` are the paths of its
    parts inside the network, the last one being the tapped output.
    """

    name: str
    block: str
    depth: int
    modules: tuple[str, ...]


class Denoiser(ABC):
    """A denoising network and its block graph: units, bypass, removal, taps, and the network call.

    Latents are [B, C, T, h, w] everywhere in the core; a subclass permutes at its own edge.
    """

    units: tuple[Unit, ...]

    def __init__(self, model: Any) -> None:
        self.model = model

    @abstractmethod
    def __call__(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The network's own answer for latents [B, C, T, h, w] as it wants them scaled, at `time` [B]."""

    @abstractmethod
    def check(self, names: Iterable[str]) -> None:
        """Raise IllegalPlan unless the named units (or whole blocks) can be removed together."""

    @abstractmethod
    def identity_of(self, unit: Unit) -> Mapping[str, Callable[..., Any]]:
        """What every module of the unit answers while it does nothing."""

    @abstractmethod
    def trimmed(self, model: nn.Module, removed: set[str]) -> tuple[type[Any], dict[str, Any]]:
        """Delete the units from `model`, which shares our weights; the class and config that rebuild it."""

    @abstractmethod
    def surviving(self, names: Iterable[str]) -> dict[str, str]:
        """Teacher unit -> student unit for every unit kept when `names` are removed."""

    @abstractmethod
    def encoder_stages(self) -> list[nn.Module]:
        """The modules whose outputs feed the discriminator heads, in forward order."""

    @abstractmethod
    def encoder_widths(self) -> list[int]:
        """Channels of the encoder stages' outputs."""

    @abstractmethod
    def stop_after_encoder(self) -> nn.Module:
        """The module that runs right after the encoder."""

    @abstractmethod
    def as_video(self, feature: Tensor, latents: Tensor) -> Tensor:
        """A tapped feature as [B, C, T, h, w], for the latents it was computed from."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Block names in forward order, such as D.0 ... M ... U.3."""
        return tuple(dict.fromkeys(unit.block for unit in self.units))

    def tap_modules(self) -> dict[str, nn.Module]:
        """For every unit the module whose output is its feature."""
        return {unit.name: self.model.get_submodule(unit.modules[-1]) for unit in self.units}

    @contextmanager
    def bypass(self, names: Iterable[str], stand_ins: StandIns | None = None) -> Iterator[None]:
        """Within the context the named units (or whole blocks) do nothing, or what stands in for them answers."""
        with ExitStack() as stack:
            for path, forward in self._silent(set(expand(names, self.units)), stand_ins or {}).items():
                stack.enter_context(answering(self.model.get_submodule(path), forward))
            yield

    def running_in_bypass(self, unit: Unit) -> tuple[str, ...]:
        """Paths of the modules that bridge two widths while the unit does nothing; () where its input is passed on."""
        return ()

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Within the context what every unit computes is compiled; taps hook it from outside, and still fire."""
        with ExitStack() as stack:
            for path in (path for unit in self.units for path in unit.modules):
                module = self.model.get_submodule(path)
                # Blocks of one class share their code, which is compiled for each width, with gradients and without.
                options: Any = {"dynamic": False, "recompile_limit": 256}
                forward = torch.compile(module.forward, **options)
                stack.enter_context(answering(module, forward))
            yield

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Within the context activations are computed again in the backward pass, as diffusers has it for the class."""
        if not type(self.model)._supports_gradient_checkpointing:
            raise ValueError(
                f"distill.checkpointing is true, but {type(self.model).__name__} has no activation checkpointing in "
                "diffusers; set it to false"
            )
        self.model.enable_gradient_checkpointing()
        try:
            yield
        finally:
            self.model.disable_gradient_checkpointing()

    def _silent(self, chosen: set[str], stand_ins: StandIns) -> dict[str, Callable[..., Any]]:
        """Module path -> stand-in for its forward, for everything that falls silent with `chosen`."""
        units = [unit for unit in self.units if unit.name in chosen]
        silent = {path: forward for unit in units for path, forward in self.identity_of(unit).items()}
        return silent | {unit.modules[0]: stand_ins[unit.name] for unit in units if unit.name in stand_ins}

    def silent_modules(self, names: Iterable[str]) -> tuple[str, ...]:
        """Paths of the modules that a bypass of the named units (or whole blocks) touches."""
        return tuple(self._silent(set(expand(names, self.units)), {}))

    def without(self, names: Iterable[str], *, shared: bool = False) -> Self:
        """A new, smaller network with its own copy of the weights, or `shared` ours; IllegalPlan where none exists.

        The new network's units are numbered anew; `surviving` gives the correspondence.
        """
        skeleton, _, (cls, config) = self._trimmed_copy(names)
        weights = skeleton.state_dict()
        return type(self)(rebuild(cls, config, weights if shared else {name: w.clone() for name, w in weights.items()}))

    def surviving_modules(self, names: Iterable[str]) -> dict[str, str]:
        """Path of every module, in a unit or not, that is left when `names` are removed -> its path in the student."""
        skeleton, copies, _ = self._trimmed_copy(names)
        left = {id(module): path for path, module in skeleton.named_modules()}
        found = {path: left.get(id(copies[id(module)])) for path, module in self.model.named_modules()}
        return {path: now for path, now in found.items() if now is not None}

    def _trimmed_copy(self, names: Iterable[str]) -> tuple[nn.Module, dict[int, Any], tuple[type[Any], dict[str, Any]]]:
        """The network without the units, sharing our weights; id of our module -> its copy; class and config."""
        removed = set(expand(names, self.units))
        self.check(removed)
        copies: dict[int, Any] = {id(t): t for t in itertools.chain(self.model.parameters(), self.model.buffers())}
        skeleton = copy.deepcopy(self.model, memo=copies)
        return skeleton, copies, self.trimmed(skeleton, removed)

    def stock_form(self) -> Any:
        """The same function as a model of a stock diffusers class, or None where none can say it."""
        return self.model

    def on_meta(self) -> Self:
        """The same graph without weights, for counting."""
        return type(self)(empty(type(self.model), config_of(self.model)).to("meta").eval())

    def removable_with(self, name: str) -> tuple[tuple[str, ...], ...]:
        """The smallest legal removals that take this unit out: what has to go with it, () for nothing.

        Looks at the unit alone, then with one other unit, then with whole stages; no answer contains another.
        Empty where all of these are illegal: the unit has to stay, or needs a projection in its place.
        """
        unit = next(u for u in self.units if u.name == name)
        others = [u.name for u in self.units if u.name != name]
        tried: list[Iterable[tuple[str, ...]]] = [
            [()],
            ((other,) for other in others),
            self._stage_removals(unit),
        ]
        for candidates in tried:
            legal = [extra for extra in candidates if self._is_legal({name, *extra})]
            if legal:
                return tuple(extra for extra in legal if not any(set(other) < set(extra) for other in legal))
        return ()

    def _stage_removals(self, unit: Unit) -> list[tuple[str, ...]]:
        """Larger removals that contain the unit and may be legal; a graph with stages knows them."""
        return []

    def _is_legal(self, names: Iterable[str]) -> bool:
        try:
            self.check(names)
        except IllegalPlan:
            return False
        return True


def expand(names: Iterable[str], units: Iterable[Unit]) -> tuple[str, ...]:
    """Unit names for a mixture of unit and block names, in graph order; unknown names are refused."""
    units = list(units)
    wanted = set(names)
    known = {unit.name for unit in units} | {unit.block for unit in units}
    if unknown := sorted(wanted - known):
        raise IllegalPlan(f"there is no unit {', '.join(unknown)}; the units are {', '.join(sorted(known))}")
    return tuple(unit.name for unit in units if unit.name in wanted or unit.block in wanted)


def config_of(model: Any) -> dict[str, Any]:
    """A model's constructor arguments, without diffusers' own notes."""
    return {key: value for key, value in dict(model.config).items() if not key.startswith("_")}


def empty(cls: type[Any], config: Mapping[str, Any]) -> Any:
    """The model of this class and config with parameters on the meta device."""
    with init_empty_weights():
        return cls.from_config(dict(config))


def rebuild(cls: type[Any], config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """The model of this class and config with exactly these weights, where they are, frozen, in eval mode.

    A key that is missing or too many, or a shape that differs, is an error: class and surgery disagree.
    """
    model = empty(cls, config)
    model.load_state_dict(weights, assign=True)
    model.to(next(iter(weights.values())).device)  # position tables are no weights, and were made on the CPU
    return model.eval().requires_grad_(False)


@contextmanager
def answering(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context `module(...)` answers `forward(...)`; contexts may be nested."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def first_argument(*args: Any, **named: Any) -> Tensor:
    """Stands in for a module that passes its input on, whatever the caller names it."""
    return args[0] if args else next(iter(named.values()))  # type: ignore[no-any-return]


def first_argument_in_tuple(*args: Any, **named: Any) -> tuple[Tensor]:
    """The same, where the caller unpacks `[0]`."""
    return (first_argument(*args, **named),)
