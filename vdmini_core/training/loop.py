"""The training loop: players take turns on a shared state; knows no architecture, loss or tracker.

The batch of a step, with everything random in it, is a function of (seed, step) and is drawn for all its clips at
once; processes and micro-batches then take their slices. A checkpoint therefore needs no random state and no data
position: train N = train k, stop, resume N - k, bit for bit, and to rounding however many processes there are.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.checkpoint import load_newest_checkpoint, save_checkpoint
from vdmini_core.training.distributed import (
    Batch,
    State,
    any_process,
    averaging,
    check_same,
    clips_at_a_time,
    is_main,
    means,
    micro_batches,
    of_all,
    of_main,
    wait_for_all,
    whole,
)
from vdmini_core.training.player import Player, restore, snapshot


class Interrupted(RuntimeError):
    """Training was asked to stop; the checkpoint it left is named in the message."""


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the message names player, step and batch."""


def train(
    players: list[Player],
    batch_of: Callable[[int, torch.Generator], Batch],
    prepare: Callable[[Batch, int], State],
    settings: LoopSettings,
    *,
    device: torch.device,
    checkpoints: Path | None = None,
    fingerprint: str = "",
    log: Log = silent_log,
    track: Track = silent_track,
    should_stop: Callable[[], bool] = lambda: False,
    after_step: Callable[[int], int | None] | None = None,
) -> None:
    """Train every player for `settings.max_steps` steps, in place; each `player.ema` holds its average.

    `batch_of(step, generator)` is the global batch: tensors and lists, clips first, what is drawn for them among
    them. `prepare(batch, step)` computes once what the players share, for some clips of it. A loss may read what
    earlier players left in the state; all players move at the end of the step. With `checkpoints`, resumes from the
    newest whole one of the same `fingerprint`. In several processes the main one alone logs and writes.

    `after_step(done)` is called in every process when so many steps are done, before their checkpoint. It may read
    the players, and names in the main process the step whose checkpoint outlives newer ones, if there is any.
    """
    clips_at_a_time(settings)
    if settings.precision == "fp16" and device.type != "cuda":
        raise ValueError(
            f"loop.precision is fp16, which needs a CUDA device, not {device.type}; set it to bf16 or fp32"
        )
    half = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    autocast = partial(torch.autocast, device.type, half, enabled=settings.precision != "fp32")
    for player in players:
        player.begin(settings, device)
    start = 0
    if checkpoints is not None and (found := load_newest_checkpoint(checkpoints, fingerprint)):
        start = found[0]
        restore(players, found[1])
    check_same(start, f"the step of the newest checkpoint in {checkpoints}", device)

    steps = range(start, settings.max_steps)
    for step in track(steps, "train", len(steps)) if is_main() else steps:
        generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
        batch = batch_of(step, generator)
        factor = learning_rate_factor(step, settings)
        metrics: dict[str, Tensor] = {}
        problems: list[str] = []

        # The players take turns on each part of the batch, whose gradients add up to those of its mean loss.
        for part, clips in enumerate(micro_batches(batch, settings), 1):
            with autocast():
                state = prepare(clips, step)
            for player in players:
                for other in players:
                    other.learns(other is player)
                with averaging(player.module, player.turn, now=part == settings.accumulate):
                    with autocast():
                        losses = player.turn(state)
                    if not torch.isfinite(total := losses["total"]):
                        problems.append(
                            f"the loss of {player.name} is {total.item()} at step {step}, batch {clips.get('ids')}; "
                            "lower the learning rate or exclude the batch"
                        )
                    player.scaler.scale(total / settings.accumulate).backward()
                for name, value in losses.items():
                    key = f"train/{player.name}/{name}"
                    metrics[key] = metrics.get(key, 0.0) + value.detach() / settings.accumulate

        if any_process(bool(problems), device):
            raise NonFiniteLoss(of_all(problems)[0])

        # Every player moves.
        for player in players:
            player.scaler.unscale_(player.optimizer)
            norm = whole(nn.utils.clip_grad_norm_(player.weights, settings.clip_norm))
            if torch.isfinite(norm):
                metrics[f"train/{player.name}/gradient_norm"] = norm
            elif player.scaler.get_scale() <= 1:  # above, in fp16, the step is left out and the scale halved
                raise NonFiniteLoss(
                    f"the gradient of {player.name} is {norm.item()} at step {step}, batch {batch.get('ids')}; "
                    "lower the learning rate, or use fp32"
                )
            for group in player.optimizer.param_groups:
                group["lr"] = player.learning_rate * factor
            player.scaler.step(player.optimizer)
            player.scaler.update()
            player.optimizer.zero_grad(set_to_none=True)
            assert player.ema is not None
            player.ema.update(step)

        if step % settings.log_every == 0:
            averages = means(metrics)
            if is_main():
                log({**averages, "train/learning_rate_factor": factor}, step)
        done, stop = step + 1, any_process(should_stop(), device)
        spare = None if after_step is None else of_main(after_step(done) or 0, device) or None
        due = stop or spare == done or done == settings.max_steps or done % settings.checkpoint_every == 0
        if checkpoints is not None and due:
            tensors = snapshot(players)
            if is_main():
                save_checkpoint(checkpoints, done, tensors, fingerprint, settings.keep_checkpoints, spare)
            wait_for_all()
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
