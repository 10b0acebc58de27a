"""Consistency distillation, on networks whose ODE has a closed form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler

from tests.zoo.toy import PROCESS, SHAPE, Toy, drawn
from vdmini_core.diffusion.process import like
from vdmini_core.settings import LoopSettings
from vdmini_core.training.checkpoint import load_newest_checkpoint
from vdmini_core.zoo.consistency import GUIDANCE, consistency_loss, distil_consistency, guided_step, solver_levels
from vdmini_core.zoo.teacher import LatentSet

CPU = torch.device("cpu")
NOTHING = {"text": torch.zeros(1, 1, 1)}
CLIP = 0.7


def one_clip(count: int = 8) -> LatentSet:
    """The same clip again and again, all of whose latents are what its text says."""
    text = torch.full((count, 1, 1), CLIP)
    return LatentSet(torch.full((count, *SHAPE), CLIP), {"text": text}, torch.ones(count, 1, *SHAPE[1:]))


def gains(student: Toy, levels: torch.Tensor) -> list[float]:
    return student.model["gain"][PROCESS.time(levels)].tolist()


def distilled(base: Toy, levels: torch.Tensor, untold: dict[str, torch.Tensor], steps: int, **options: Any) -> Any:
    """The student, and what was logged of every step."""
    history: list[dict[str, float]] = []
    fast = {"batch_size": 4, "warmup_steps": 1, "decay_fraction": 0.0, "ema_decay": 0.9}
    settings = LoopSettings(max_steps=steps, precision="fp32", log_every=1, checkpoint_every=3, **fast)
    student = distil_consistency(
        base, PROCESS, levels, one_clip(), untold, settings, CPU, log=lambda row, step: history.append(row), **options
    )
    return student, [row["train/student/total"] for row in history]


def test_the_solvers_levels_are_those_that_lcm_samples_from() -> None:
    scheduler = LCMScheduler(original_inference_steps=50)
    scheduler.set_timesteps(50)
    assert torch.equal(solver_levels(PROCESS, 50), PROCESS.sigmas[scheduler.timesteps.flip(0)])


def test_a_guided_step_follows_the_guided_ode() -> None:
    # Told of the clip the base means x0 = CLIP, else x0 = 0: with guidance it means (1 + w) CLIP.
    scale, sigma, following = (
        torch.tensor([0.0, 1.5, 4.0]),
        PROCESS.sigmas[[999, 500, 19]],
        PROCESS.sigmas[[979, 480, 0]],
    )
    following[2] = 0
    x, told = drawn(3, *SHAPE), {"text": torch.full((3, 1, 1), CLIP)}
    x0 = like((1 + scale) * CLIP, x).expand_as(x)
    a, b = PROCESS.shares(like(sigma, x))
    expected = PROCESS.noised(x0, (x - a * x0) / b, following)
    found = guided_step(Toy(), PROCESS, x, sigma, following, told, NOTHING, scale)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not found.requires_grad


def test_a_perfect_network_is_its_own_consistency_model() -> None:
    same = {"text": torch.full((1, 1, 1), CLIP)}  # told or not, it knows the clip
    levels = solver_levels(PROCESS, 50)
    student, losses = distilled(Toy(), levels, same, steps=12)
    assert losses[0] < 1e-6
    assert max(losses) < 1e-3  # Adam makes whole steps of rounding errors
    assert gains(student, levels) == pytest.approx([1] * 50, abs=0.01)
    _, losses = distilled(Toy(), levels[:1], NOTHING, steps=12)  # it is not where guidance leads
    assert min(losses) > 0.1


def test_the_student_learns_where_the_guided_ode_ends() -> None:
    levels = solver_levels(PROCESS, 4)
    student, _ = distilled(Toy(), levels, NOTHING, steps=400, learning_rate=0.1)
    mean = 1 + sum(GUIDANCE) / 2  # which of the scales it is, this student does not look at
    assert gains(student, levels) == pytest.approx([mean] * 4, rel=0.2)


def test_the_student_alone_is_told_the_scale_and_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdmini_core.zoo.consistency.guidance_embedding", lambda scale: scale[:, None])
    base = Toy()
    student, _ = distilled(base, solver_levels(PROCESS, 50), NOTHING, steps=50)
    assert not student.model["gain"].equal(torch.ones(1000))
    assert base.model["gain"].equal(torch.ones(1000))
    assert not any(hasattr(told, "guidance") for told in base.told)
    scales = torch.cat([told.guidance for told in student.told])
    assert scales.shape == (200, 1)
    assert GUIDANCE[0] <= scales.min() < GUIDANCE[0] + 0.2
    assert GUIDANCE[1] >= scales.max() > GUIDANCE[1] - 0.2


def test_an_interrupted_distillation_goes_on_exactly(tmp_path: Path) -> None:
    levels = solver_levels(PROCESS, 50)
    whole, _ = distilled(Toy(), levels, NOTHING, steps=6, checkpoints=tmp_path / "whole", fingerprint="a")
    distilled(Toy(), levels, NOTHING, steps=3, checkpoints=tmp_path / "parts", fingerprint="a")
    found = load_newest_checkpoint(tmp_path / "parts", "a")
    assert found is not None
    assert found[0] == 3
    again, losses = distilled(Toy(), levels, NOTHING, steps=6, checkpoints=tmp_path / "parts", fingerprint="a")
    assert len(losses) == 3
    assert torch.equal(whole.model["gain"], again.model["gain"])
    assert not torch.equal(whole.model["gain"], torch.ones(1000))


def test_large_errors_cost_their_size_and_small_ones_their_square() -> None:
    zero, ones = torch.zeros(1, *SHAPE), torch.ones(1, 1, *SHAPE[1:])
    assert consistency_loss(zero, zero, ones) == 0
    assert consistency_loss(zero + 2.0, zero, ones).item() == pytest.approx(2, abs=2e-3)
    assert consistency_loss(zero + 1e-4, zero, ones).item() == pytest.approx(1e-8 / 2e-3, rel=0.01)
    assert consistency_loss(zero + 2.0, zero, 3 * ones).item() == pytest.approx(6, abs=6e-3)
