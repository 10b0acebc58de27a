"""The training loop: players take turns on a shared state; knows no architecture, loss or tracker.

Everything random in a step is drawn from one generator seeded by (seed, step), and the batch of a
step is a function of the step. A checkpoint therefore needs no random state and no data position:
train N = train k, stop, resume N - k, bit for bit.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.checkpoint import load_newest_checkpoint, save_checkpoint
from vdmini_core.training.ema import EMA

State = dict[str, Any]
Batch = dict[str, Any]


class Interrupted(RuntimeError):
    """Training was asked to stop; the checkpoint it left is named in the message."""


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the message names player, step and batch."""


@dataclass
class Player:
    """One set of weights with its own optimizer and its own loss.

    `loss(state)` returns named scalars; `total` is minimised, every one is logged as
    `train/<player>/<name>`. During a player's turn only its own parameters require gradients.
    """

    name: str
    module: nn.Module
    loss: Callable[[State], dict[str, Tensor]]
    learning_rate: float
    optimizer: torch.optim.Optimizer = field(init=False)
    ema: EMA | None = field(init=False, default=None)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.module.parameters()


def train(
    players: list[Player],
    batch_of: Callable[[int], Batch],
    prepare: Callable[[Batch, torch.Generator, int], State],
    settings: LoopSettings,
    *,
    device: torch.device,
    checkpoints: Path | None = None,
    fingerprint: str = "",
    log: Log = silent_log,
    track: Track = silent_track,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train every player for `settings.max_steps` steps, in place; each `player.ema` holds its average.

    `prepare(batch, generator, step)` computes once what the players share. With `checkpoints`, resumes
    from the newest whole one of the same `fingerprint`.
    """
    for player in players:
        player.optimizer = torch.optim.AdamW(
            player.parameters(),
            lr=player.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        player.ema = EMA(player.module, settings.ema_decay)
    start = 0
    if checkpoints is not None and (found := load_newest_checkpoint(checkpoints, fingerprint)):
        start = found[0]
        _restore(players, found[1])

    for step in track(range(start, settings.max_steps), "train", settings.max_steps - start):
        generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
        batch = batch_of(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            state = prepare(batch, generator, step)

        metrics: dict[str, float] = {}
        for player in players:
            for other in players:
                other.module.requires_grad_(other is player)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                losses = player.loss(state)
            total = losses["total"]
            if not torch.isfinite(total):
                raise NonFiniteLoss(
                    f"the loss of {player.name} is {total.item()} at step {step}, batch {batch.get('ids')}; "
                    "lower the learning rate or exclude the batch"
                )
            total.backward()
            norm = nn.utils.clip_grad_norm_(player.parameters(), settings.clip_norm)
            if not torch.isfinite(norm):
                raise NonFiniteLoss(
                    f"the gradient of {player.name} is {norm.item()} at step {step}, batch {batch.get('ids')}; "
                    "lower the learning rate, or use fp32"
                )
            for group in player.optimizer.param_groups:
                group["lr"] = player.learning_rate * learning_rate_factor(step, settings)
            player.optimizer.step()
            player.optimizer.zero_grad(set_to_none=True)
            assert player.ema is not None
            player.ema.update(player.module, step)
            if step % settings.log_every == 0:
                metrics |= {f"train/{player.name}/{k}": v.item() for k, v in losses.items()}
                metrics[f"train/{player.name}/gradient_norm"] = norm.item()
        if metrics:
            metrics["train/learning_rate_factor"] = learning_rate_factor(step, settings)
            log(metrics, step)

        done, stop = step + 1, should_stop()
        if checkpoints is not None and (stop or done % settings.checkpoint_every == 0):
            save_checkpoint(checkpoints, done, _snapshot(players), fingerprint, settings.keep_checkpoints)
        if stop:
            raise Interrupted(f"stopped after step {done}; the same command resumes from {checkpoints}")


def learning_rate_factor(step: int, settings: LoopSettings) -> float:
    """Linear warm-up, a plateau, then a cosine to zero over the last `decay_fraction` of the steps."""
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    decay_steps = settings.decay_fraction * settings.max_steps
    into = step - (settings.max_steps - decay_steps)
    if decay_steps <= 0 or into <= 0:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(into / decay_steps, 1.0)))


def _snapshot(players: list[Player]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for player in players:
        names = [name for name, _ in player.module.named_parameters()]
        tensors |= {f"{player.name}.weights.{k}": v for k, v in player.module.state_dict().items()}
        for index, moments in player.optimizer.state_dict()["state"].items():
            tensors |= {f"{player.name}.optimizer.{names[index]}.{k}": v for k, v in moments.items()}
        assert player.ema is not None
        tensors |= {f"{player.name}.ema.{k}": v for k, v in player.ema.average.items()}
    return tensors


def _restore(players: list[Player], tensors: dict[str, Tensor]) -> None:
    for player in players:
        weights = _under(tensors, f"{player.name}.weights.")
        player.module.load_state_dict(weights)
        moments = _under(tensors, f"{player.name}.optimizer.")
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, _) in enumerate(player.module.named_parameters()):
            own = {k.rsplit(".", 1)[1]: v for k, v in moments.items() if k.rsplit(".", 1)[0] == name}
            if own:
                state[index] = own
        skeleton = player.optimizer.state_dict()
        player.optimizer.load_state_dict({"state": state, "param_groups": skeleton["param_groups"]})
        assert player.ema is not None
        for name, average in player.ema.average.items():
            average.copy_(tensors[f"{player.name}.ema.{name}"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
