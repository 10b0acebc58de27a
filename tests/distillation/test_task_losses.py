"""Every task's loss: who is trained by it, and what it is, by formulas of its own."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import new_unet, write_latents
from tests.training.test_distributed import new_teacher
from tests.zoo.toy import PROCESS, SHAPE, Toy
from vdmini_core.data.latents import LatentCache
from vdmini_core.diffusion.process import EpsilonPrediction, FlowMatching, Process, VPrediction
from vdmini_core.distillation.heads import Discriminator
from vdmini_core.distillation.icmd import ICMD, distill
from vdmini_core.distillation.task_losses import TASK_LOSSES, TaskLoss
from vdmini_core.models import Condition, Denoiser
from vdmini_core.settings import DistillSettings
from vdmini_core.training.player import Player

CPU = torch.device("cpu")
REMOVED = ("D.0.1", "U.3.1")
LOOP = {"max_steps": 2, "batch_size": 2, "warmup_steps": 0, "precision": "fp32", "log_every": 1}
HEADS = {"warmup_steps": 10, "ramp_steps": 20}
WARM, HALFWAY, LATE = 5, 20, 30
HUBER = 1e-3
each_task = pytest.mark.parametrize("task", TASK_LOSSES)


def settings_of(task: str, loop: dict[str, Any] | None = None, **changes: Any) -> DistillSettings:
    values = {"task": task, "loop": LOOP | (loop or {}), "discriminator": HEADS, "mca_weight": 2.0}
    return DistillSettings.model_validate(values | changes)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def huber(a: Tensor, b: Tensor) -> Tensor:
    return (((a - b) ** 2 + HUBER**2) ** 0.5 - HUBER).mean()


class Step:
    """Teacher, student without two pairs, heads, and all who are trained, with one batch."""

    def __init__(self, data: LatentCache, settings: DistillSettings) -> None:
        teacher = new_unet()
        self.teacher, self.student = teacher, teacher.without(REMOVED)
        torch.manual_seed(1)
        self.heads = Discriminator(teacher.encoder_widths())
        matches = teacher.surviving(REMOVED)
        self.icmd = ICMD(teacher, self.student, self.heads, matches, VPrediction(), settings, CPU)
        self.players = [
            Player("student", self.student.model, self.icmd.student_loss, 0.0),
            Player("discriminator", self.heads, self.icmd.discriminator_loss, 0.0),
            *self.icmd.task.players(),
        ]
        self.batch = self.icmd.draw(data.shuffled(0, 2, 0), torch.Generator().manual_seed(0))

    def turn(self, player: Player, state: dict[str, Any]) -> dict[str, Tensor]:
        """What the training loop does: only the player's own weights want a gradient."""
        for other in self.players:
            other.module.requires_grad_(other is player)
        return player.loss(state)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return write_latents(tmp_path_factory.mktemp("latents"), 4, size=8)


def test_the_settings_name_the_rows_of_the_table() -> None:
    assert get_args(DistillSettings.model_fields["task"].annotation) == tuple(TASK_LOSSES)


@each_task
def test_every_turn_touches_its_own_player_alone(data: LatentCache, task: str) -> None:
    step = Step(data, settings_of(task))
    for player in step.players:
        player.module.requires_grad_(True)
    state = step.icmd.prepare(step.batch, LATE)
    assert not any(tensor.requires_grad for tensor in tensors_of(state))
    modules = {"teacher": step.teacher.model} | {player.name: player.module for player in step.players}
    assert len(modules) == (4 if TASK_LOSSES[task].adversarial else 3)
    for player in step.players:
        step.turn(player, state)["total"].backward()
        touched = {name for name, module in modules.items() if any(p.grad is not None for p in module.parameters())}
        assert touched == {player.name}
        assert all(p.grad is not None for p in player.module.parameters())
        player.module.zero_grad()


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for part in parts for tensor in tensors_of(part)]


@each_task
def test_content_and_motion_losses_are_added_to_every_task(data: LatentCache, task: str) -> None:
    step = Step(data, settings_of(task))
    losses = step.turn(step.players[0], step.icmd.prepare(step.batch, HALFWAY))
    torch.testing.assert_close(losses["total"], losses["task"] + 0.1 * losses["icd"] + 1.0 * losses["mca"])
    assert min(losses["task"], losses["icd"], losses["mca"].abs()) > 0


@each_task
def test_micro_batches_make_the_same_training(tmp_path: Path, task: str) -> None:
    data = write_latents(tmp_path, 4, size=8)
    curves = []
    for accumulate in (1, 2):
        teacher = new_teacher()
        student, rows = teacher.without(("M",)), list[dict[str, float]]()
        settings = settings_of(
            task,
            loop={"batch_size": 4, "accumulate": accumulate},
            discriminator={"warmup_steps": 0, "ramp_steps": 2},
        )
        distill(
            teacher,
            student,
            teacher.surviving(("M",)),
            VPrediction(),
            data,
            settings,
            CPU,
            log=lambda row, step, rows=rows: rows.append(row),  # type: ignore[misc]
        )
        curves.append(rows)
    assert curves[0] == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in curves[1]]
    assert ("train/task_discriminator/total" in curves[0][0]) is TASK_LOSSES[task].adversarial
    assert curves[0][1]["train/student/task"] != curves[0][0]["train/student/task"]


class Squashed:
    """A network with one weight whose answer depends on the latents and on the level."""

    def __init__(self) -> None:
        self.model = nn.ParameterDict({"gain": nn.Parameter(torch.tensor(0.8))})

    def __call__(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        told = time.float().reshape(-1, 1, 1, 1, 1)
        return self.model["gain"] * (latents + told / 1000).tanh()


def told_flow(network: Squashed, x0: Tensor, noise: Tensor, level: int, steps: int) -> Tensor:
    """x0 that the velocity means at t = level / steps: x_t - t v."""
    t = level / steps
    x = (1 - t) * x0 + t * noise
    return x - t * network(x, torch.tensor([1000 * t]), {})


def told_edm(network: Squashed, x0: Tensor, noise: Tensor, level: int, steps: int) -> Tensor:
    """D(y; sigma) = c_skip y + c_out F(c_in y; ln(sigma) / 4) for y = x0 + sigma noise, sigma_data = 1 (EDM)."""
    sigma = torch.tensor((0.002 ** (1 / 7) + (level - 1) / (steps - 1) * (700 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7)
    y, scale = x0 + sigma * noise, (sigma**2 + 1).sqrt()
    return y / scale**2 - sigma / scale * network(y / scale, (sigma.log() / 4)[None], {})


def told_lcm(network: Squashed, x0: Tensor, noise: Tensor, level: int, steps: int) -> Tensor:
    """(x - sqrt(1 - alpha) epsilon) / sqrt(alpha) at training step 1000 / steps * level - 1."""
    step = 1000 // steps * level - 1
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[step].float()
    x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    return (x - (1 - alpha).sqrt() * network(x, torch.tensor([step]), {})) / alpha.sqrt()


@pytest.mark.parametrize(
    ("process", "told"),
    [(FlowMatching(), told_flow), (VPrediction(), told_edm), (PROCESS, told_lcm)],
    ids=["flow", "edm", "lcm"],
)
def test_consistency_compares_with_the_student_at_the_next_lower_level(
    process: Process, told: Callable[..., Tensor]
) -> None:
    steps, levels = 5, (1, 2, 4, 5)
    x0, noise = drawn(len(levels), *SHAPE), drawn(len(levels), *SHAPE, seed=1)
    network = Squashed()
    task = task_of("consistency", network, process, steps)
    sigma = torch.stack([task.levels[level - 1] for level in levels])
    lower = torch.stack([task.lower[level - 1] for level in levels])
    loss = loss_of(task, network, {"latents": x0, "noise": noise, "sigma": sigma, "lower": lower})
    loss.backward()
    found, network.model["gain"].grad = network.model["gain"].grad, None

    terms = []
    for clip, level in enumerate(levels):
        one = x0[clip : clip + 1], noise[clip : clip + 1]
        below = one[0] if level == 1 else told(network, *one, level - 1, steps).detach()
        terms.append(huber(told(network, *one, level, steps), below))
    expected = torch.stack(terms).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found, network.model["gain"].grad, rtol=1e-2, atol=1e-4)


def task_of(name: str, student: Any, process: Process, steps: int) -> Any:
    settings = settings_of(name, consistency={"steps": steps})
    return TASK_LOSSES[name](None, student, process, settings, CPU)


def loss_of(task: TaskLoss, network: Any, batch: dict[str, Tensor], condition: Condition | None = None) -> Tensor:
    """The student's turn of a step without teacher."""
    noisy = task.process.noised(batch["latents"], batch["noise"], batch["sigma"])
    state: dict[str, Any] = {"noisy": noisy, "sigma": batch["sigma"], "condition": condition or {}}
    with torch.no_grad():
        state |= task.prepare(batch, state, torch.empty(0))
    answer = network(noisy, task.process.time(batch["sigma"]), state["condition"])
    return task.loss(answer, [], state)["task"]


def test_consistency_teaches_the_clip_at_every_level() -> None:
    # The clip is 0.7 everywhere, which is gain 1 of this student; it begins with gain 2 at every level.
    student, clip = Toy(), 0.7
    student.model["gain"].data.fill_(2.0)
    task = task_of("consistency", student, PROCESS, steps=4)
    optimizer = torch.optim.Adam(student.model.parameters(), lr=0.05, betas=(0.9, 0.99))
    for step in range(300):
        generator = torch.Generator().manual_seed(step)
        batch = task.draw(8, generator) | {"noise": torch.randn(8, *SHAPE, generator=generator)}
        batch["latents"] = torch.full((8, *SHAPE), clip)
        optimizer.zero_grad()
        loss_of(task, student, batch, {"text": torch.full((8, 1, 1), clip)}).backward()
        optimizer.step()
    gains = student.model["gain"][PROCESS.time(task.levels)].tolist()
    assert gains == pytest.approx([1.0] * 4, abs=0.1)


def test_consistency_draws_every_level_of_the_solver_and_its_neighbour() -> None:
    task = task_of("consistency", Squashed(), PROCESS, steps=50)
    found = task.draw(2000, torch.Generator().manual_seed(0))
    assert torch.equal(found["sigma"].unique(), task.levels)
    assert torch.equal(found["lower"].unique(), torch.cat([torch.zeros(1), task.levels[:-1]]))
    assert bool((found["lower"] < found["sigma"]).all())


def test_a_solver_finer_than_the_training_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="a solver of 2000 steps; the process has 1000: take as many or fewer"):
        task_of("consistency", Squashed(), PROCESS, steps=2000)


def test_one_step_is_reconstruction_and_the_verdict_of_its_own_heads(data: LatentCache) -> None:
    step = Step(data, settings_of("one_step", one_step={"adversarial_weight": 3.0}))
    task: Any = step.icmd.task
    state = step.icmd.prepare(step.batch, HALFWAY)
    losses = step.turn(step.players[0], state)

    clips, sigma = step.batch["latents"], step.batch["sigma"].reshape(-1, 1, 1, 1, 1)
    x, answer = state["noisy"], step.student(state["noisy"], sigma.flatten().log() / 4, state["condition"])
    x0 = x / (1 + sigma**2).sqrt() - sigma / (1 + sigma**2).sqrt() * answer
    fake, real = (features_by_hand(step.teacher, value, step.batch, state["condition"]) for value in (x0, clips))
    told = step.batch["heads_sigma"].log() / 4
    fakes, reals = task.heads(fake, told), task.heads(real, told)
    adversarial = -torch.stack([logits.mean() for logits in fakes]).mean()
    torch.testing.assert_close(losses["reconstruction"], huber(x0, clips))
    torch.testing.assert_close(losses["adversarial"], adversarial)
    torch.testing.assert_close(losses["task"], huber(x0, clips) + 3.0 * 0.5 * adversarial)

    hinge = [(1 + f).clamp_min(0).mean() + (1 - r).clamp_min(0).mean() for f, r in zip(fakes, reals, strict=True)]
    found = step.turn(step.players[2], state)
    torch.testing.assert_close(found["total"], torch.stack(hinge).mean())
    assert not torch.allclose(found["total"], step.turn(step.players[1], state)["total"])  # theirs is the teacher


def features_by_hand(teacher: Denoiser, x0: Tensor, batch: dict[str, Any], condition: Condition) -> list[Tensor]:
    """What the encoder's stages put out in a whole forward pass over the clip noised anew."""
    sigma = batch["heads_sigma"].reshape(-1, 1, 1, 1, 1)
    noisy = (x0 + sigma * batch["heads_noise"]) / (1 + sigma**2).sqrt()
    found: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Any) -> None:
        found.append(output[0].unflatten(0, x0.shape[:1] + x0.shape[2:3]).transpose(1, 2))

    hooks = [stage.register_forward_hook(keep) for stage in teacher.encoder_stages()]
    teacher(noisy, sigma.flatten().log() / 4, condition)
    for hook in hooks:
        hook.remove()
    return found


def test_one_step_is_reconstruction_alone_while_its_heads_warm_up(data: LatentCache) -> None:
    step = Step(data, settings_of("one_step", mca_weight=0.0))
    losses = step.turn(step.players[0], step.icmd.prepare(step.batch, WARM))
    assert losses["task"] == losses["reconstruction"]
    assert not losses["adversarial"].requires_grad
    assert "mca" not in losses
    assert step.turn(step.players[2], step.icmd.prepare(step.batch, LATE) | {"fake": step_fake(step)})["total"] > 0


def step_fake(step: Step) -> list[Tensor]:
    """What a student's turn leaves for the heads, without the MCA loss."""
    state = step.icmd.prepare(step.batch, LATE)
    step.icmd.student_loss(state)
    assert not any(feature.requires_grad for feature in state["fake"])
    return state["fake"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "process", [VPrediction(), PROCESS, FlowMatching()], ids=lambda process: type(process).__name__
)
def test_one_step_is_trained_at_high_levels(process: Process) -> None:
    settings = settings_of("one_step", one_step={"sigma_mean": 4.0, "sigma_std": 1.5})
    teacher: Any = SimpleNamespace(encoder_widths=lambda: [8])
    task = TASK_LOSSES["one_step"](teacher, teacher, process, settings, CPU)
    sigma = task.draw(4000, torch.Generator().manual_seed(0))["sigma"]
    if isinstance(process, EpsilonPrediction):
        assert bool(torch.isin(sigma, process.sigmas).all())
        assert (sigma == process.sigmas[-1]).float().mean() > 0.8  # ln of the last is 2.7
    else:
        assert sigma.log().mean().item() == pytest.approx(4.0, abs=0.1)
        assert sigma.log().std().item() == pytest.approx(1.5, abs=0.1)
