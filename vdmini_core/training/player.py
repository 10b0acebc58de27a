"""One player of a training: weights with their own loss, optimizer and average, and how they are kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vdmini_core.settings import LoopSettings
from vdmini_core.training.distributed import Losses, State, gathered, joined, placed
from vdmini_core.training.ema import EMA

MakeOptimizer = Callable[[list[nn.Parameter], float, LoopSettings], torch.optim.Optimizer]


def adamw(weights: list[nn.Parameter], learning_rate: float, settings: LoopSettings) -> torch.optim.Optimizer:
    """AdamW as the settings have it."""
    return torch.optim.AdamW(
        weights, lr=learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


@dataclass
class Player:
    """One set of weights with its own optimizer and its own loss.

    `loss(state)` returns named scalars, each a mean over clips; `total` is minimised, every one is logged as
    `train/<player>/<name>`. During a player's turn only its own parameters require gradients.
    """

    name: str
    module: nn.Module
    loss: Callable[[State], Losses]
    learning_rate: float
    make_optimizer: MakeOptimizer = adamw
    turn: Callable[[State], Losses] = field(init=False)
    weights: list[nn.Parameter] = field(init=False)
    _holders: list[nn.Module] = field(init=False, repr=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    ema: EMA | None = field(init=False, default=None)

    def begin(self, settings: LoopSettings, device: torch.device) -> None:
        """Join the processes, then make optimizer, average and loss scale; the scale does nothing but in fp16."""
        self.turn = joined(self.module, self.loss, settings)
        # To walk all modules takes milliseconds, several times a step.
        self.weights = list(self.module.parameters())
        self._holders = [part for part in self.module.modules() if any(True for _ in part.parameters(recurse=False))]
        self.optimizer = self.make_optimizer(self.weights, self.learning_rate, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.ema = EMA(self.module, settings.ema_decay)

    def learns(self, now: bool) -> None:
        """Whether its weights require gradients; those that its modules hold now, whole or sharded."""
        for holder in self._holders:
            for weight in holder.parameters(recurse=False):
                weight.requires_grad_(now)

    def finish(self) -> None:
        """Leave the averaged weights on the module, which is trained no longer."""
        assert self.ema is not None
        self.ema.copy_to(self.module)
        self.module.eval().requires_grad_(False)


def averaged(player: Player) -> dict[str, Tensor]:
    """The player's state with its averages as weights, whole; empty in other processes than the main one."""
    assert player.ema is not None
    state = player.module.state_dict()
    return gathered(state | {name: value.to(state[name].dtype) for name, value in player.ema.average.items()})


def snapshot(players: list[Player]) -> dict[str, Tensor]:
    """Everything a checkpoint needs, whole, under dotted names; empty in other processes than the main one."""
    tensors: dict[str, Tensor] = {}
    for player in players:
        names = [name for name, _ in player.module.named_parameters()]
        tensors |= {f"{player.name}.weights.{k}": v for k, v in player.module.state_dict().items()}
        for index, moments in player.optimizer.state_dict()["state"].items():
            tensors |= {f"{player.name}.optimizer.{names[index]}.{k}": v for k, v in moments.items()}
        tensors |= {f"{player.name}.scaler.{k}": torch.tensor(v) for k, v in player.scaler.state_dict().items()}
        assert player.ema is not None
        tensors |= {f"{player.name}.ema.{k}": v for k, v in player.ema.average.items()}
    return gathered(tensors)


def restore(players: list[Player], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `snapshot` took, in as many processes as there are now."""
    for player in players:
        own = player.module.state_dict()
        weights = _under(tensors, f"{player.name}.weights.")
        player.module.load_state_dict({k: placed(v, own[k]) for k, v in weights.items()})
        moments = _under(tensors, f"{player.name}.optimizer.")
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(player.module.named_parameters()):
            of_this = {k.rsplit(".", 1)[1]: v for k, v in moments.items() if k.rsplit(".", 1)[0] == name}
            if of_this:  # the count of steps is a number, and no process's part
                state[index] = {k: placed(v, parameter) if v.ndim else v for k, v in of_this.items()}
        skeleton = player.optimizer.state_dict()
        player.optimizer.load_state_dict({"state": state, "param_groups": skeleton["param_groups"]})
        player.scaler.load_state_dict({k: v.item() for k, v in _under(tensors, f"{player.name}.scaler.").items()})
        assert player.ema is not None
        for name, average in player.ema.average.items():
            average.copy_(placed(tensors[f"{player.name}.ema.{name}"], average))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
