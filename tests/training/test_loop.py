"""The training loop: resuming is exact, and everything that goes wrong is named."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vdmini_core.settings import LoopSettings
from vdmini_core.training.checkpoint import load_checkpoint
from vdmini_core.training.distributed import Batch, State
from vdmini_core.training.loop import Interrupted, NonFiniteLoss, learning_rate_factor, train
from vdmini_core.training.player import Player

BatchOf = Callable[[int, torch.Generator], Batch]

SETTINGS = LoopSettings(
    max_steps=10, batch_size=4, warmup_steps=2, precision="fp32", log_every=1, checkpoint_every=2, ema_decay=0.9
)


def batch_of(step: int, generator: torch.Generator) -> Batch:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return {"ids": [step, step + 1, 8, 9], "x": x, "noise": torch.randn(x.shape, generator=generator)}


def prepare(batch: Batch, step: int) -> State:
    return {"x": batch["x"], "noise": batch["noise"]}


def new_players(count: int) -> list[Player]:
    """A linear map, and with two players a second one that learns what the first leaves behind."""
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 1)

    def fit(state: State) -> dict[str, Tensor]:
        state["output"] = first(state["x"] + state["noise"])
        return {"total": ((state["output"] - state["x"]) ** 2).mean()}

    def judge(state: State) -> dict[str, Tensor]:
        return {"total": (second(state["output"].detach()) - 1).square().mean()}

    return [Player("first", first, fit, 1e-2), Player("second", second, judge, 1e-2)][:count]


def state_of(players: list[Player]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for player in players:
        assert player.ema is not None
        found |= {f"{player.name}.{name}": value for name, value in player.module.state_dict().items()}
        found |= {f"{player.name}.ema.{name}": value for name, value in player.ema.average.items()}
        for index, moments in player.optimizer.state_dict()["state"].items():
            found |= {f"{player.name}.{index}.{name}": value for name, value in moments.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def run(
    count: int, folder: Path | None = None, batches: BatchOf = batch_of, changes: object = None, **options: object
) -> dict[str, Tensor]:
    players = new_players(count)
    train(
        players,
        batches,
        prepare,
        SETTINGS.model_copy(update=changes),
        device=torch.device("cpu"),
        checkpoints=folder,
        **options,
    )
    return state_of(players)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def killed_at(step: int) -> BatchOf:
    def batches(current: int, generator: torch.Generator) -> Batch:
        if current == step:
            raise KeyboardInterrupt
        return batch_of(current, generator)

    return batches


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("killed", [4, 7])
def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path, count: int, killed: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(count, tmp_path, killed_at(killed))
    steps: list[int] = []
    resumed = run(count, tmp_path, log=lambda metrics, step: steps.append(step))
    assert steps == list(range(killed // 2 * 2, 10))
    assert same(resumed, run(count))


def test_a_training_that_is_complete_is_not_trained_again(tmp_path: Path) -> None:
    done = run(2, tmp_path)
    steps: list[int] = []
    assert same(run(2, tmp_path, log=lambda metrics, step: steps.append(step)), done)
    assert steps == []


def test_what_is_called_after_a_step_sees_its_averages_and_names_the_checkpoint_that_is_spared(tmp_path: Path) -> None:
    players, averages = new_players(1), dict[int, Tensor]()

    def after_step(done: int) -> int | None:
        assert players[0].ema is not None
        averages[done] = players[0].ema.average["weight"].clone()
        return 3 if done >= 3 else None

    settings = SETTINGS.model_copy(update={"keep_checkpoints": 1})
    device = torch.device("cpu")
    train(players, batch_of, prepare, settings, device=device, checkpoints=tmp_path, after_step=after_step)
    assert list(averages) == list(range(1, 11))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000010"]
    for step in (3, 10):
        assert torch.equal(load_checkpoint(tmp_path, step, "")["first.ema.weight"], averages[step])
    assert same(state_of(players), run(1))


def test_the_seed_decides_the_noise() -> None:
    players = new_players(1)
    settings = SETTINGS.model_copy(update={"seed": 1})
    train(players, batch_of, prepare, settings, device=torch.device("cpu"))
    assert not same(state_of(players), run(1))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(2, tmp_path, killed_at(7))
    file = tmp_path / "step-00000006" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    steps: list[int] = []
    with caplog.at_level(logging.WARNING):
        resumed = run(2, tmp_path, log=lambda metrics, step: steps.append(step))
    assert "step-00000006 is damaged (the digest of state.safetensors differs" in caplog.text
    assert steps[0] == 4
    assert same(resumed, run(2))


def test_a_checkpoint_of_another_run_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(1, tmp_path, fingerprint="one")
    steps: list[int] = []
    with caplog.at_level(logging.WARNING):
        run(1, tmp_path, fingerprint="two", log=lambda metrics, step: steps.append(step))
    assert steps == list(range(10))
    assert "belongs to a run with other settings; not resumed" in caplog.text


def test_stopping_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    calls: list[int] = []

    def should_stop() -> bool:
        calls.append(1)
        return len(calls) == 3

    with pytest.raises(Interrupted, match="stopped after step 3; the same command resumes from"):
        run(2, tmp_path, should_stop=should_stop)
    manifest = json.loads((tmp_path / "step-00000003" / "checkpoint.json").read_text())
    assert manifest["step"] == 3
    assert same(run(2, tmp_path), run(2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_player_step_and_batch(tmp_path: Path, value: float) -> None:
    def batches(step: int, generator: torch.Generator) -> Batch:
        batch = batch_of(step, generator)
        batch["x"][2] = value if step == 5 else 1.0
        return batch

    with pytest.raises(NonFiniteLoss, match=r"the loss of first is (nan|inf) at step 5, batch \[5, 6, 8, 9\]; lower"):
        run(2, tmp_path, batches)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_of_a_batch_that_is_not_finite_the_micro_batch_is_named() -> None:
    def batches(step: int, generator: torch.Generator) -> Batch:
        batch = batch_of(step, generator)
        batch["x"][2] = math.nan
        return batch

    with pytest.raises(NonFiniteLoss, match=r"at step 0, batch \[8, 9\]; lower"):
        run(2, batches=batches, changes={"accumulate": 2})


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_add_up_to_the_batch(parts: int) -> None:
    rows: dict[int, list[dict[str, float]]] = {1: [], parts: []}
    ends = {
        count: run(2, changes={"accumulate": count}, log=lambda row, step, kept=kept: kept.append(row))
        for count, kept in rows.items()
    }
    for row, expected in zip(rows[parts], rows[1], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    for name, value in ends[parts].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)


def test_a_batch_that_micro_batches_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loop.batch_size is 4, .* loop.accumulate x processes = 3 x 1: change"):
        run(1, changes={"accumulate": 3})


def test_float16_is_refused_without_cuda() -> None:
    with pytest.raises(ValueError, match=r"loop.precision is fp16, which needs a CUDA device, not cpu"):
        run(1, changes={"precision": "fp16"})


def test_only_the_player_whose_turn_it_is_requires_gradients() -> None:
    players = new_players(2)
    turns: list[tuple[str, bool, bool]] = []
    for player in players:

        def loss(state: State, player: Player = player, inner: Callable = player.loss) -> dict[str, Tensor]:
            turns.append((player.name, *(all(p.requires_grad for p in other.weights) for other in players)))
            return inner(state)

        player.loss = loss
    train(players, batch_of, prepare, SETTINGS, device=torch.device("cpu"))
    assert turns == [("first", True, False), ("second", False, True)] * 10


def test_every_loss_is_logged_under_its_player_as_often_as_asked() -> None:
    seen: dict[int, dict[str, float]] = {}
    settings = SETTINGS.model_copy(update={"log_every": 4})
    train(
        new_players(2),
        batch_of,
        prepare,
        settings,
        device=torch.device("cpu"),
        log=lambda metrics, step: seen.update({step: metrics}),
    )
    assert sorted(seen) == [0, 4, 8]
    assert sorted(seen[0]) == [
        "train/first/gradient_norm",
        "train/first/total",
        "train/learning_rate_factor",
        "train/second/gradient_norm",
        "train/second/total",
    ]


def test_training_lowers_the_loss() -> None:
    seen: list[float] = []
    settings = SETTINGS.model_copy(update={"max_steps": 200})
    train(
        new_players(1),
        batch_of,
        prepare,
        settings,
        device=torch.device("cpu"),
        log=lambda metrics, step: seen.append(metrics["train/first/total"]),
    )
    assert sum(seen[-20:]) < 0.7 * sum(seen[:20])


def test_the_learning_rate_warms_up_stays_and_decays_as_a_cosine() -> None:
    settings = LoopSettings(max_steps=100, batch_size=1, warmup_steps=10, decay_fraction=0.4)
    factors = [learning_rate_factor(step, settings) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:61] == [1.0] * 51
    assert factors[70] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[80] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)


@pytest.mark.parametrize("step", [0, 50, 99])
def test_without_warm_up_and_decay_the_learning_rate_is_constant(step: int) -> None:
    settings = LoopSettings(max_steps=100, batch_size=1, warmup_steps=0, decay_fraction=0)
    assert learning_rate_factor(step, settings) == 1.0
