"""Checkpoints, averages and the metrics file: whole, bounded and readable after a crash."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vdmini_core.training import checkpoint
from vdmini_core.training.checkpoint import load_checkpoint, load_newest_checkpoint, save_checkpoint
from vdmini_core.training.ema import EMA
from vdmini_core.training.history import History

ROOT = Path(__file__).parents[2]


def tensors(value: float) -> dict[str, Tensor]:
    return {"a.weight": torch.full((2, 3), value), "a.step": torch.tensor(value)}


def loaded(folder: Path, fingerprint: str = "f") -> tuple[int, float] | None:
    found = load_newest_checkpoint(folder, fingerprint)
    return found and (found[0], found[1]["a.step"].item())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoint_is_loaded(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, tensors(step), "f", keep=3)
    assert loaded(tmp_path) == (100, 100.0)


def test_no_checkpoint_means_to_start_anew(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path / "nowhere", "f") is None
    assert load_newest_checkpoint(tmp_path, "f") is None


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, tensors(step), "f", keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 2, 3, 4)[-keep:]]


def test_a_spared_checkpoint_is_kept_besides_the_newest_and_loaded_by_its_step(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, tensors(step), "f", keep=2, spare=1)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 3, 4)]
    assert load_checkpoint(tmp_path, 1, "f")["a.step"] == 1
    save_checkpoint(tmp_path, 5, tensors(5), "f", keep=2, spare=4)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 5)]


def test_a_checkpoint_asked_for_by_its_step_is_that_one_or_an_error(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, tensors(1), "f", keep=1)
    with pytest.raises(FileNotFoundError, match="step-00000002"):
        load_checkpoint(tmp_path, 2, "f")
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        load_checkpoint(tmp_path, 1, "another")
    (path / "state.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"the digest of state\.safetensors differs"):
        load_checkpoint(tmp_path, 1, "f")


def test_later_steps_of_another_run_do_not_push_out_what_was_just_written(tmp_path: Path) -> None:
    for step in (500, 600):
        save_checkpoint(tmp_path, step, tensors(step), "another", keep=2)
    save_checkpoint(tmp_path, 50, tensors(50), "f", keep=1)
    assert loaded(tmp_path) == (50, 50.0)


def test_another_runs_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), "f", keep=5)
    save_checkpoint(tmp_path, 2, tensors(2), "another", keep=5)
    assert loaded(tmp_path) == (1, 1.0)


def test_a_half_written_folder_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), "f", keep=5)
    whole = save_checkpoint(tmp_path, 2, tensors(2), "f", keep=5)
    (whole / "checkpoint.json").unlink()
    draft = tmp_path / ".step-00000003.partial"
    draft.mkdir()
    (draft / "state.safetensors").write_bytes(b"half")
    assert loaded(tmp_path) == (1, 1.0)
    save_checkpoint(tmp_path, 3, tensors(3), "f", keep=5)
    assert loaded(tmp_path) == (3, 3.0)
    assert not draft.exists()


@pytest.mark.parametrize("damage", ["", "{", '{"step": 2}'])
def test_an_unreadable_manifest_falls_back(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), "f", keep=5)
    newest = save_checkpoint(tmp_path, 2, tensors(2), "f", keep=5)
    (newest / "checkpoint.json").write_text(damage)
    assert loaded(tmp_path) == (1, 1.0)
    assert "step-00000002 is damaged" in caplog.text


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), "f", keep=2)
    save_checkpoint(tmp_path, 1, tensors(9), "f", keep=2)
    assert loaded(tmp_path) == (1, 9.0)


def test_the_average_has_its_closed_form() -> None:
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema = EMA(module, decay=0.5)
    expected = 1.0
    for step, value in enumerate((3.0, 5.0, -1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0)):
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_the_average_is_float32_and_copied_in_the_modules_own_precision() -> None:
    module = nn.Linear(2, 2).half()
    ema = EMA(module, decay=0.9)
    assert {value.dtype for value in ema.average.values()} == {torch.float32}
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    ema.copy_to(module)
    assert torch.equal(module.weight, before)
    assert module.weight.dtype == torch.float16


def test_steps_repeated_after_a_resume_count_once_and_last(tmp_path: Path) -> None:
    history = History(tmp_path / "deep" / "history.jsonl")
    for step, loss in ((0, 5.0), (1, 4.0), (2, 3.0)):
        history.log({"loss": loss}, step)
    resumed = History(tmp_path / "deep" / "history.jsonl")
    for step, loss in ((1, 4.5), (2, 3.5), (3, 2.5)):
        resumed.log({"loss": loss}, step)
    assert [(row["step"], row["loss"]) for row in resumed.rows()] == [(0, 5.0), (1, 4.5), (2, 3.5), (3, 2.5)]


def test_a_line_cut_off_by_a_crash_costs_itself_alone(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    History(file).log({"loss": 5.0}, 0)
    with file.open("a") as stream:
        stream.write('{"step": 1, "lo')
    assert [row["step"] for row in History(file).rows()] == [0]
    History(file).log({"loss": 4.0}, 1)
    assert [(row["step"], row["loss"]) for row in History(file).rows()] == [(0, 5.0), (1, 4.0)]


def test_the_history_is_written_as_one_file_even_when_empty(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.write(tmp_path / "empty.json")
    history.log({"loss": 5.0}, 3)
    history.write(tmp_path / "one.json")
    assert json.loads((tmp_path / "empty.json").read_text()) == {"rows": []}
    assert json.loads((tmp_path / "one.json").read_text()) == {"rows": [{"step": 3, "loss": 5.0}]}


FULL_DISK = """
import sys, torch
from pathlib import Path
from vdmini_core.training.checkpoint import load_newest_checkpoint, save_checkpoint

folder = Path(sys.argv[1]) / "checkpoints"
try:
    for step in range(1, 99):
        save_checkpoint(folder, step, {"a": torch.full((100_000,), float(step))}, "f", keep=99)
except OSError as error:
    print(type(error).__name__, error.errno, error)
print(sorted(path.name for path in folder.iterdir()))
print(load_newest_checkpoint(folder, "f")[1]["a"][0].item())
"""


def test_a_disk_that_is_really_full_keeps_the_older_checkpoints_and_leaves_no_half(tmp_path: Path) -> None:
    """A file system of 1 MB takes two checkpoints of 0.4 MB."""
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && "$@"', str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    command = [*mounted, sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    told, found, value = done.stdout.splitlines()
    assert told.startswith("OSError 28 ")
    assert f"no space left in {tmp_path}/checkpoints for checkpoint 3 of 0.0004 GB" in told
    assert "keep_checkpoints + 1 = 100 have to fit" in told
    assert found == "['step-00000001', 'step-00000002']"
    assert value == "2.0"


@pytest.mark.parametrize("failing", ["save_file", "write_json"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), "f", keep=1)

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, fail)
        with pytest.raises(OSError, match=f"no space left in {tmp_path} for checkpoint 2"):
            save_checkpoint(tmp_path, 2, tensors(2), "f", keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert loaded(tmp_path) == (1, 1.0)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    save_checkpoint(tmp_path, 1, tensors(1), "f", keep=1)
    assert events == [
        "sync state.safetensors",
        "sync checkpoint.json",
        "sync .step-00000001.partial",
        "rename to step-00000001",
        f"sync {tmp_path.name}",
    ]


def test_what_a_killed_save_left_behind_goes_with_the_next_save(tmp_path: Path) -> None:
    for name in (".step-00000137.partial", ".step-00000002.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 200, tensors(200), "f", keep=1)
    assert names(tmp_path) == ["step-00000200"]
