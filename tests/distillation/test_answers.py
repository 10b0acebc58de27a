"""Kept answers of the teacher: what they are, that they are computed once, and that training cannot tell."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import write_latents
from tests.training.test_distributed import new_teacher
from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.diffusion.process import EpsilonPrediction, FlowMatching, Process, VPrediction
from vdmini_core.distillation import answers as module
from vdmini_core.distillation.answers import TeacherAnswers, teacher_needed
from vdmini_core.distillation.icmd import distill
from vdmini_core.models import Denoiser
from vdmini_core.settings import DistillSettings
from vdmini_core.training.loop import Interrupted

CPU = torch.device("cpu")
CLIPS, DRAWS = 4, 3
INPUTS = {"teacher": "t", "latents": "l"}
LOOP = {"max_steps": 4, "batch_size": 2, "warmup_steps": 0, "precision": "fp32", "log_every": 1}


def settings_of(loop: dict[str, Any] | None = None, **changes: Any) -> DistillSettings:
    values = {"target": "teacher", "teacher_draws": DRAWS, "icd_weight": 0.0, "mca_weight": 0.0}
    return DistillSettings.model_validate(values | changes | {"loop": LOOP | (loop or {})})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return write_latents(tmp_path_factory.mktemp("latents"), CLIPS, size=8)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, data: LatentCache) -> TeacherAnswers:
    found = kept(tmp_path_factory.mktemp("answers"), data)
    found.fill(new_teacher, CPU)
    return found


def kept(root: Path, data: LatentCache, settings: DistillSettings | None = None) -> TeacherAnswers:
    return TeacherAnswers(root, data, VPrediction(), settings or settings_of(), INPUTS)


def no_teacher() -> Denoiser:
    raise AssertionError("the teacher was loaded")


def answered_by(teacher: Denoiser, answers: TeacherAnswers) -> Callable[[list[int], Tensor], Tensor]:
    """What `answers.read` should find, with the teacher run anew for every call."""

    def read(ids: list[int], draws: Tensor) -> Tensor:
        rows = answers.data.rows(ids)
        x0 = rows["latents"]
        pairs = [answers.fixed(clip, k, x0.shape[1:]) for clip, k in zip(ids, draws.tolist(), strict=True)]
        sigma, noise = torch.cat([sigma for sigma, _ in pairs]), torch.stack([noise for _, noise in pairs])
        wide = sigma.reshape(-1, 1, 1, 1, 1)
        noisy = (x0 + wide * noise) / (1 + wide**2).sqrt()
        with torch.no_grad():
            return teacher(noisy, sigma.log() / 4, condition_of(rows))

    return read


def test_what_is_kept_is_the_teachers_answer(filled: TeacherAnswers) -> None:
    ids, draws = [3, 0, 3], torch.tensor([2, 0, 1])
    expected = answered_by(new_teacher(), filled)(ids, draws)
    torch.testing.assert_close(filled.read(ids, draws), expected, rtol=1e-4, atol=1e-5)


def test_a_draw_is_a_function_of_seed_clip_and_number(data: LatentCache, tmp_path: Path) -> None:
    shape = torch.Size((4, 2, 3, 3))
    first, other = kept(tmp_path, data), kept(tmp_path, data, settings_of(loop={"seed": 1}))
    sigma, noise = first.fixed(2, 1, shape)
    assert torch.equal(first.fixed(2, 1, shape)[1], noise)
    for different in (first.fixed(2, 0, shape), first.fixed(1, 2, shape), other.fixed(2, 1, shape)):
        assert not torch.equal(different[0], sigma)
        assert not torch.equal(different[1], noise)


def test_a_batch_has_one_draw_of_each_of_its_clips(data: LatentCache, tmp_path: Path) -> None:
    shape, found = torch.Size((4, 2, 3, 3)), kept(tmp_path, data)
    ids = [3, 1] * 50
    batch = found.draw(ids, shape, torch.Generator().manual_seed(0))
    assert set(batch["draw"].tolist()) == set(range(DRAWS))
    for row in (0, 1, 57):
        sigma, noise = found.fixed(ids[row], int(batch["draw"][row]), shape)
        assert torch.equal(batch["sigma"][row : row + 1], sigma)
        assert torch.equal(batch["noise"][row], noise)


@pytest.mark.parametrize("mca_weight", [0.0, 1.0])
def test_the_loss_curve_is_that_of_a_teacher_that_runs(
    filled: TeacherAnswers, data: LatentCache, monkeypatch: pytest.MonkeyPatch, mca_weight: float
) -> None:
    settings = settings_of(mca_weight=mca_weight, discriminator={"warmup_steps": 0, "ramp_steps": 2})
    curves = []
    for live in (False, True):
        teacher = new_teacher()
        student, rows = teacher.without(("M",)), list[dict[str, float]]()
        if live:
            monkeypatch.setattr(filled, "read", answered_by(new_teacher(), filled))
        distill(
            teacher if mca_weight > 0 else None,
            student,
            teacher.surviving(("M",)) if mca_weight > 0 else {},
            VPrediction(),
            data,
            settings,
            CPU,
            answers=filled,
            log=lambda row, step, rows=rows: rows.append(row),  # type: ignore[misc]
        )
        curves.append(rows)
    assert len(curves[0]) == LOOP["max_steps"]
    assert curves[0] == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in curves[1]]
    assert all(row["train/student/task"] > 0 for row in curves[0])
    assert ("train/student/mca" in curves[0][0]) is (mca_weight > 0)


def test_an_interrupted_filling_goes_on_where_it_stopped(data: LatentCache, tmp_path: Path) -> None:
    found, asked = kept(tmp_path, data), []

    def stop_at_the_third() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(Interrupted, match="stopped before clip 2; the same command goes on"):
        found.fill(new_teacher, CPU, should_stop=stop_at_the_third)
    files = sorted(found.folder.iterdir())
    assert found.missing() == [2, 3]
    before = [path.stat().st_ino for path in files]
    files[1].write_bytes(files[1].read_bytes()[:-8])  # a damaged one is computed again, the other stays
    assert found.missing() == [1, 2, 3]
    found.fill(new_teacher, CPU)
    assert found.missing() == []
    assert len(list(found.folder.iterdir())) == CLIPS
    assert files[0].stat().st_ino == before[0]
    found.fill(no_teacher, CPU)


def test_answers_that_do_not_fit_into_a_step_are_computed_in_parts(filled: TeacherAnswers, tmp_path: Path) -> None:
    calls: list[int] = []
    teacher = new_teacher()

    class Counting:
        def __call__(self, latents: Tensor, *others: Any) -> Tensor:
            calls.append(len(latents))
            return teacher(latents, *others)

    found: Any = kept(tmp_path, filled.data)
    again = found._answers(Counting(), 1, CPU)
    assert calls == [2, 1]
    torch.testing.assert_close(again, filled.read([1] * DRAWS, torch.arange(DRAWS)), rtol=1e-4, atol=1e-5)


def test_answers_are_kept_in_the_type_they_were_given_in(data: LatentCache, tmp_path: Path) -> None:
    found = kept(tmp_path, data, settings_of(loop={"precision": "bf16"}))
    found.fill(new_teacher, CPU)
    assert {tensor.dtype for path in found.folder.iterdir() for tensor in load_file(path).values()} == {torch.bfloat16}


def test_a_full_disk_leaves_nothing_half_written(
    data: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    found = kept(tmp_path, data)
    monkeypatch.setattr(module, "save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        found.fill(new_teacher, CPU)
    assert list(found.folder.iterdir()) == []


def test_what_the_answers_depend_on_names_their_folder(data: LatentCache, tmp_path: Path) -> None:
    def folder(process: Process, settings: DistillSettings, **inputs: str) -> Path:
        return TeacherAnswers(tmp_path, data, process, settings, INPUTS | inputs).folder

    v = VPrediction()
    same = {folder(v, settings_of()), folder(v, settings_of(learning_rate=1.0, loop={"max_steps": 9}))}
    assert len(same) == 1
    others = [
        folder(FlowMatching(), settings_of()),
        folder(EpsilonPrediction(torch.tensor([0.9, 0.5])), settings_of()),
        folder(EpsilonPrediction(torch.tensor([0.9, 0.4])), settings_of()),
        folder(v, settings_of(sigma_mean=0.1)),
        folder(v, settings_of(sigma_std=1.0)),
        folder(v, settings_of(teacher_draws=4)),
        folder(v, settings_of(loop={"seed": 1})),
        folder(v, settings_of(loop={"precision": "bf16"})),
        folder(v, settings_of(), teacher="u"),
        folder(v, settings_of(), latents="m"),
    ]
    assert len({*same, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        ({"mca_weight": 1.0}, True),
        ({"teacher_draws": 0}, True),
        ({"teacher_draws": 0, "icd_weight": 1.0}, True),
        ({"teacher_draws": 0, "target": "data"}, False),
        ({"teacher_draws": 0, "target": "data", "task": "one_step"}, True),
        ({"teacher_draws": 0, "target": "data", "task": "consistency"}, False),
    ],
)
def test_the_teacher_is_done_without_where_its_answers_are_all_that_is_wanted(
    changes: dict[str, Any], needed: bool
) -> None:
    assert teacher_needed(settings_of(**changes)) is needed
