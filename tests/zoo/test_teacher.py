"""Training a teacher: levels, weights, and what it is told in place of a condition."""

from pathlib import Path

import pytest
import torch

from tests.models.tiny_unets import TEXT_3D, inputs_of, new_unet_of
from tests.zoo.toy import PROCESS, SHAPE, Toy, drawn
from vdmini_core.settings import LoopSettings
from vdmini_core.zoo.teacher import LatentSet, train_teacher

CPU = torch.device("cpu")


def settings(steps: int, **changes: object) -> LoopSettings:
    values = {"max_steps": steps, "batch_size": 4, "warmup_steps": 1, "precision": "fp32", "log_every": 1}
    return LoopSettings(**values | changes)


def told(count: int) -> LatentSet:
    """Clips of noise, each told that it is 1."""
    return LatentSet(drawn(count, *SHAPE), {"text": torch.ones(count, 1, 1)}, torch.ones(count, 1, *SHAPE[1:]))


def test_every_epoch_shows_every_clip_once_in_its_own_order() -> None:
    first, second = (
        [clip for step in range(3 * epoch, 3 * epoch + 3) for clip in told(12).shuffled(step, settings(1))["ids"]]
        for epoch in range(2)
    )
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_levels_are_log_normal_and_end_at_the_highest() -> None:
    denoiser = Toy()
    train_teacher(denoiser, PROCESS, told(200), settings(50), CPU, levels=(0.5, 1.6))
    times = torch.cat([row.time for row in denoiser.told])
    assert (times == 999).float().mean().item() == pytest.approx(0.087, abs=0.06)
    assert PROCESS.sigmas[times].log().median().item() == pytest.approx(0.5, abs=0.35)


def test_a_tenth_of_the_clips_is_told_nothing() -> None:
    denoiser = Toy()
    nothing = {"text": torch.full((1, 1, 1), -1.0)}
    train_teacher(denoiser, PROCESS, told(200), settings(50), CPU, untold=nothing)
    text = torch.cat([row.text for row in denoiser.told])
    assert sorted(text.unique().tolist()) == [-1, 1]
    assert (text == -1).float().mean().item() == pytest.approx(0.1, abs=0.06)


def test_a_guides_guided_answers_are_learned_where_all_is_told() -> None:
    # Told 1 the guide means x0 = 1, told nothing 0: with guidance 2 it means 3.
    guide, denoiser = Toy(), Toy()
    nothing = {"text": torch.zeros(1, 1, 1)}
    quick = settings(150, ema_decay=0.9, decay_fraction=0.3)
    near = (0.0, 0.01)
    train_teacher(
        denoiser, PROCESS, told(8), quick, CPU, learning_rate=0.1, levels=near, untold=nothing, guide=(guide, 2.0)
    )
    visited = torch.cat([row.time for row in denoiser.told]).mode().values
    assert denoiser.model["gain"][visited].item() == pytest.approx(3, abs=0.1)
    assert guide.model["gain"].equal(torch.ones(1000))
    assert torch.cat([row.text for row in denoiser.told]).unique().tolist() == [1]


def test_errors_are_those_of_the_velocity() -> None:
    # The toy says x0 = 1; where the clip is 0 its velocity is wrong by a (1 / sigma) / a = 1 / b.
    data = LatentSet(torch.zeros(4, *SHAPE), {"text": torch.ones(4, 1, 1)}, torch.full((4, 1, *SHAPE[1:]), 2.0))
    denoiser, rows = Toy(), []
    train_teacher(denoiser, PROCESS, data, settings(1), CPU, log=lambda row, step: rows.append(row))
    sigma = PROCESS.sigmas[denoiser.told[0].time]
    assert rows[0]["train/teacher/total"] == pytest.approx((2 * (1 + sigma**-2)).mean().item(), rel=1e-3)


def test_a_few_steps_on_one_clip_lower_the_loss_and_resume_exactly(tmp_path: Path) -> None:
    latents, condition = inputs_of(TEXT_3D)
    data = LatentSet(latents, {"text": condition["text"]}, torch.ones(1, 1, *latents.shape[2:]))
    losses = []

    def trained(steps: int, checkpoints: Path | None = None) -> dict[str, torch.Tensor]:
        denoiser = new_unet_of(TEXT_3D, (16, 16, 16, 16), layers_per_block=1)
        changes = {"batch_size": 1, "checkpoint_every": 1, "decay_fraction": 0.0}
        options = {"checkpoints": checkpoints, "fingerprint": "a"}
        log = lambda row, step: losses.append(row["train/teacher/total"])  # noqa: E731
        train_teacher(denoiser, PROCESS, data, settings(steps, **changes), CPU, levels=(0, 0.01), log=log, **options)
        return denoiser.model.state_dict()

    trained(12)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    whole = trained(3)
    trained(2, tmp_path)
    again = trained(3, tmp_path)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
