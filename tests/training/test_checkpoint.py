"""Checkpoints, averages and the metrics file: whole, bounded and readable after a crash."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vdmini_core.training.checkpoint import load_newest_checkpoint, save_checkpoint
from vdmini_core.training.ema import EMA
from vdmini_core.training.history import History


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
        ema.update(module, step)
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
