"""SIGKILL at random moments, also inside a checkpoint write: every resume ends like the uninterrupted run.

The training is real and runs in processes of its own, forked from a server that has imported PyTorch.
"""

import itertools
import logging
import multiprocessing
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vdmini_core.settings import LoopSettings
from vdmini_core.training import checkpoint
from vdmini_core.training.distributed import Batch, State
from vdmini_core.training.loop import train
from vdmini_core.training.player import Player

KILLS, KILLS_PER_RUN = 20, 5
STEPS, EVERY, KEEP = 60, 3, 2
STEP_S, WRITE_S = 0.002, 0.03
SETTINGS = LoopSettings(
    max_steps=STEPS, batch_size=4, precision="fp32", checkpoint_every=EVERY, keep_checkpoints=KEEP, ema_decay=0.9
)

processes = multiprocessing.get_context("forkserver")


def training(folder: Path, settings: LoopSettings = SETTINGS) -> None:
    """Train a small network to the end or to the kill; leaves `weights.safetensors` if it gets there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8))

    def batch_of(step: int, generator: torch.Generator) -> Batch:
        time.sleep(STEP_S)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        return {"x": x, "noise": torch.randn(x.shape, generator=generator)}

    def prepare(batch: Batch, step: int) -> State:
        return batch

    def loss(state: State) -> dict[str, Tensor]:
        return {"total": (network(state["x"] + state["noise"]) - state["x"]).square().mean()}

    player = Player("student", network, loss, 1e-2)
    train([player], batch_of, prepare, settings, device=torch.device("cpu"), checkpoints=folder, fingerprint="f")
    assert player.ema is not None
    averages = {f"ema.{name}": value for name, value in player.ema.average.items()}
    checkpoint.save_file({**network.state_dict(), **averages}, folder.parent / f"{folder.name}.safetensors")


def slow_training(folder: Path) -> None:
    """`training` on a disk so slow that a kill often hits a half-written file."""
    whole = checkpoint.save_file

    def save_file(tensors: dict[str, Tensor], file: Path) -> None:
        whole(tensors, file)
        content = file.read_bytes()
        with file.open("wb", buffering=0) as stream:
            for start in range(0, len(content), len(content) // 4):
                time.sleep(WRITE_S / 5)
                stream.write(content[start : start + len(content) // 4])

    checkpoint.save_file = save_file
    training(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every checkpoint, and the result, of the run that nobody interrupts."""
    # The first step of an optimizer imports the second module, which takes seconds.
    processes.set_forkserver_preload([__name__, "torch._dynamo"])
    folder = tmp_path_factory.mktemp("reference") / "whole"
    process = processes.Process(target=training, args=(folder, SETTINGS.model_copy(update={"keep_checkpoints": 99})))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return folder


def kill_somewhere(process: BaseProcess, folder: Path, chance: random.Random, in_a_write: bool) -> None:
    """SIGKILL after a random time; `in_a_write`, at a random moment of a checkpoint's."""
    known = set(folder.glob("step-*"))
    while process.is_alive() and (not folder.exists() or set(folder.glob("step-*")) == known):
        time.sleep(0.002)  # so that every life gets further than the one before
    if in_a_write:
        while process.is_alive() and not any(folder.glob(".step-*.partial")):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, WRITE_S))
    else:
        time.sleep(chance.uniform(0, 3 * (EVERY * STEP_S + WRITE_S)))
    process.kill()
    process.join()


def assert_whole(folder: Path, reference: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a resume would take is, bit for bit, what the uninterrupted run had at that step."""
    caplog.clear()
    for path in folder.glob("step-*"):
        assert (path / "checkpoint.json").read_bytes() == (reference / path.name / "checkpoint.json").read_bytes()
    found = checkpoint.load_newest_checkpoint(folder, "f")
    assert found is not None
    step, tensors = found
    expected = load_file(reference / f"step-{step:08d}" / "state.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_twenty_kills_at_random_moments_change_no_bit(
    reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chance, kills, halves = random.Random(0), 0, 0
    for number in range(KILLS):
        folder = tmp_path / f"run-{number}"
        for _ in range(KILLS_PER_RUN):
            process = processes.Process(target=slow_training, args=(folder,))
            process.start()
            kill_somewhere(process, folder, chance, in_a_write=kills % 2 == 0)
            if process.exitcode == 0:  # on a busy machine the kill may come too late
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            halves += any(folder.glob(".step-*.partial"))
            assert_whole(folder, reference, caplog)
        last = processes.Process(target=training, args=(folder,))
        last.start()
        last.join(120)
        assert last.exitcode == 0
        result, expected = (load_file(path.with_suffix(".safetensors")) for path in (folder, reference))
        assert all(torch.equal(result[name], expected[name]) for name in expected)
        assert len(list(folder.iterdir())) == KEEP, "something half written or half removed was left behind"
        if kills >= KILLS:
            break
    print(f"{kills} kills in {number + 1} runs, {halves} of them inside a write")
    assert kills >= KILLS
    assert halves >= KILLS // 4, "too few kills hit a write for this test to mean anything"


def test_a_kill_between_any_two_file_operations_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename, removal and sync of a save in turn becomes the last thing the process does."""

    class Killed(BaseException):
        pass

    def dying_at(moment: int, folder: Path) -> bool:
        count = itertools.count()

        def counted(function):
            def wrapper(*arguments, **options):
                if next(count) == moment:
                    raise Killed
                return function(*arguments, **options)

            return wrapper

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (Path, "mkdir"), (checkpoint.os, "fsync"), (checkpoint.os, "rmdir")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            for name in ("save_file", "write_json", "file_digest"):
                patch.setattr(checkpoint, name, counted(getattr(checkpoint, name)))
            try:
                checkpoint.save_checkpoint(folder, 6, {"a": torch.tensor(6.0)}, "f", keep=2)
            except Killed:
                return True
            return False

    moments = 0
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        for step in (2, 4):
            checkpoint.save_checkpoint(folder, step, {"a": torch.tensor(float(step))}, "f", keep=2)
        died = dying_at(moment, folder)
        found = checkpoint.load_newest_checkpoint(folder, "f")
        assert found is not None
        assert found[0] in ((4, 6) if died else (6,))
        assert found[1]["a"] == found[0]
        assert all((path / "checkpoint.json").is_file() for path in folder.glob("step-*"))
        if not died:
            break
        moments += 1
    assert moments >= 10
