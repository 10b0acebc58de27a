"""Validation watches a distillation and leaves it alone: same weights, same rows after a resume, the best kept."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import write_latents
from vdmini_core.artifacts import Alarm, Quality
from vdmini_core.data.latents import LatentCache
from vdmini_core.distillation import validation as module
from vdmini_core.distillation.icmd import distill
from vdmini_core.distillation.validation import Validation, best_step, score, validation_table
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.evaluation.quality import compare, decoded_batches, generated_batches, judge
from vdmini_core.models import SVD, Denoiser
from vdmini_core.settings import AlarmSettings, DiscriminatorSettings, DistillSettings, LoopSettings, ValidationSettings
from vdmini_core.training.history import History
from vdmini_core.training.loop import Interrupted

REMOVED = ("D.0.1", "U.3.1")
CLIPS, STEPS = 3, 6
WATCH = ValidationSettings(every=2, clips=CLIPS, steps=1, batch_size=2)
LOOP = LoopSettings(max_steps=STEPS, batch_size=2, warmup_steps=0, precision="fp32", log_every=1, checkpoint_every=3)
SETTINGS = DistillSettings(
    loop=LOOP, discriminator=DiscriminatorSettings(warmup_steps=0, ramp_steps=1), validation=WATCH
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return write_latents(tmp_path_factory.mktemp("latents"), 8, size=8)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    return Evaluator().eval().requires_grad_(False)


class Training:
    """Distillations in one folder, each with a validation of its own as after a restart."""

    def __init__(self, pipeline: SVD, data: LatentCache, evaluator: Evaluator, folder: Path) -> None:
        self.pipeline, self.data, self.evaluator, self.folder = pipeline, data, evaluator, folder
        self.history = History(folder / "history.jsonl")
        self.logged: dict[int, dict[str, float]] = {}
        self.shown: list[Path] = []
        self.alerted: list[Alarm] = []

    def watch(self, settings: ValidationSettings = WATCH) -> Validation:
        return Validation(
            self.pipeline,
            lambda: self.pipeline.denoiser,
            self.data,
            self.evaluator,
            settings,
            self.history,
            self.folder / "validation",
            log=lambda metrics, step: self.logged.update({step: metrics}),
            show=self.shown.append,
            alert=self.alerted.append,
        )

    def run(self, watching: Validation | None, stop_after: int = STEPS + 1, **changes: Any) -> dict[str, Tensor]:
        """The student's weights in the end; Interrupted when asked to stop."""
        student = self.pipeline.denoiser.without(REMOVED)
        matches = self.pipeline.denoiser.surviving(REMOVED)
        polls = iter(range(1, STEPS + 2))
        distill(
            self.pipeline.denoiser,
            student,
            matches,
            self.pipeline.process,
            self.data,
            SETTINGS.model_copy(update=changes),
            torch.device("cpu"),
            checkpoints=self.folder,
            log=self.history.log,
            should_stop=lambda: next(polls) == stop_after,
            validation=watching,
        )
        return student.model.state_dict()


@pytest.fixture
def training(tiny_pipeline: SVD, data: LatentCache, evaluator: Evaluator, tmp_path: Path) -> Training:
    return Training(tiny_pipeline, data, evaluator, tmp_path / "run")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_validation_changes_no_bit_of_the_training_and_a_resume_gives_the_same_rows(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.watch()
    weights = training.run(whole)
    assert [row.step for row in whole.rows(STEPS)] == [2, 4, 6]

    unwatched = Training(training.pipeline, training.data, training.evaluator, tmp_path / "unwatched")
    assert same(weights, unwatched.run(None, validation=ValidationSettings()))
    assert unwatched.history.rows() == training.history.rows()

    again = Training(training.pipeline, training.data, training.evaluator, tmp_path / "again")
    with pytest.raises(Interrupted):
        again.run(again.watch(), stop_after=5)
    monkeypatch.setattr(Validation, "_of_teacher", lambda self: pytest.fail("the teacher's clips were made again"))
    resumed = again.watch()
    assert [row.step for row in resumed.rows(STEPS)] == [2, 4]
    assert same(weights, again.run(resumed))
    assert resumed.report(STEPS) == whole.report(STEPS)


def test_a_row_says_what_evaluation_says_of_the_last_test_clips(training: Training) -> None:
    pipeline, data = training.pipeline, training.data
    student = pipeline.denoiser.without(REMOVED)
    training.history.log({"train/discriminator/total": 1.5, "train/student/total": 9.0}, 0)
    training.history.log({"train/discriminator/total": 1.7}, 1)
    training.history.log({"train/discriminator/total": 0.1}, 2)
    validation = training.watch()
    validation(2, student)
    (row,) = validation.rows(2)
    first = len(data) - CLIPS
    real = judge(decoded_batches(pipeline, data, CLIPS, WATCH, first), training.evaluator)
    generated = judge(generated_batches(pipeline, student, data, WATCH, first=first), training.evaluator)
    quality = compare(generated, real)
    assert (row.content_accuracy, row.motion_accuracy) == (quality.content_accuracy, quality.motion_accuracy)
    assert row.content_distance == pytest.approx(quality.content_distance)
    assert row.motion_distance == pytest.approx(quality.motion_distance)
    assert row.discriminator_hinge == pytest.approx(1.6)
    assert training.logged[2]["validation/motion_distance"] == row.motion_distance
    assert training.shown == [training.folder / "validation/clips-00000002.png"]
    assert Image.open(training.shown[0]).size == (4 * 32, 2 * CLIPS * 32)


def test_the_teacher_as_its_own_student_has_ratios_of_one_and_no_alarm(training: Training) -> None:
    validation = training.watch()
    validation(2, training.pipeline.denoiser)
    (row,) = validation.rows(2)
    assert (row.flow_ratio, row.flicker_ratio, row.contrast_ratio) == pytest.approx((1.0, 1.0, 1.0))
    assert row.content_distance == pytest.approx(validation.teacher.content_distance)
    assert row.discriminator_hinge is None
    assert training.alerted == []
    assert "No alarm." in validation_table(validation.report(2), "last")


def test_an_alarm_is_told_once_and_is_in_the_report(training: Training, caplog: pytest.LogCaptureFixture) -> None:
    validation = training.watch(WATCH.model_copy(update={"alarms": AlarmSettings(motion_collapse=1.5)}))
    with caplog.at_level(logging.WARNING):
        for step in (2, 4):
            validation(step, training.pipeline.denoiser)
    assert [(alarm.name, alarm.step) for alarm in training.alerted] == [("motion_collapse", 2)]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert warning.startswith("step 2, alarm motion_collapse: ")
    report = validation.report(4)
    assert report.alarms == tuple(training.alerted)
    assert "- **motion_collapse**, step 2: " in validation_table(report, "last")


@pytest.fixture
def fake_scores(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """Scores .1, .9, .3 of the validations in turn, and the weights that each of them saw."""
    seen: dict[int, dict[str, Tensor]] = {}
    scores = {2: 0.1, 4: 0.9, 6: 0.3}
    call = Validation.__call__

    def recording(self: Validation, step: int, student: Denoiser) -> None:
        seen[step] = {name: value.clone() for name, value in student.model.state_dict().items()}
        monkeypatch.setattr(module, "score", lambda student, teacher: scores[step])
        call(self, step, student)

    monkeypatch.setattr(Validation, "__call__", recording)
    return seen


def test_the_best_checkpoint_outlives_newer_ones_and_becomes_the_student(
    training: Training, fake_scores: dict[int, dict[str, Tensor]]
) -> None:
    loop = LOOP.model_copy(update={"checkpoint_every": 1, "keep_checkpoints": 1})
    last = training.run(training.watch(), loop=loop)
    assert checkpoints(training.folder) == [4, 6]
    assert same(last, fake_scores[6])
    best = training.run(training.watch(), loop=loop, keep="best")
    assert same(best, fake_scores[4])
    assert not same(best, last)


def test_a_resume_that_validates_nothing_still_spares_the_best(
    training: Training, fake_scores: dict[int, dict[str, Tensor]]
) -> None:
    loop = LOOP.model_copy(update={"checkpoint_every": 1, "keep_checkpoints": 1})
    with pytest.raises(Interrupted):
        training.run(training.watch(), loop=loop, stop_after=4)
    with pytest.raises(Interrupted):
        training.run(training.watch(), loop=loop, stop_after=1)
    assert checkpoints(training.folder) == [4, 5]


def test_where_nothing_was_validated_the_best_is_refused(training: Training) -> None:
    training.run(None, validation=ValidationSettings())
    with pytest.raises(ValueError, match=r"distill\.keep is best, but no step .* set distill\.keep to last, or remove"):
        training.run(training.watch(), keep="best")


def test_a_best_checkpoint_that_is_gone_is_named(training: Training) -> None:
    training.run(training.watch())
    kept = training.watch()
    kept._rows[5] = kept.rows(STEPS)[0].model_copy(update={"step": 5, "score": 9.0})
    with pytest.raises(ValueError, match=r"is step 5, but its .*step-00000005/checkpoint\.json does not exist"):
        training.run(kept, keep="best")


def test_a_picture_of_long_or_large_clips_stays_small() -> None:
    long = torch.arange(15.0).view(1, 15, 1, 1).expand(3, 15, 12, 12)
    assert module._small(long)[0, :, 0, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    large = torch.rand(3, 2, 320, 576, generator=torch.Generator().manual_seed(0))
    assert module._small(large).shape == (3, 2, 89, 160)
    assert module._small(large).mean().item() == pytest.approx(large.mean().item(), abs=1e-3)


def quality(content: float | None, motion: float | None, far: float) -> Quality:
    return Quality(clips=4, content_accuracy=content, motion_accuracy=motion, content_distance=far, motion_distance=2)


def test_the_score_is_the_mean_accuracy_or_minus_the_distance_in_units_of_the_teachers() -> None:
    teacher = quality(None, None, 10.0)
    assert score(quality(0.5, 0.9, 99.0), teacher) == pytest.approx(0.7)
    assert score(quality(None, None, 40.0), teacher) == pytest.approx(-(4 + 1) / 2)
    assert score(teacher, teacher) == -1


def test_of_equal_scores_the_later_is_the_best(training: Training) -> None:
    validation = training.watch()
    assert validation.best(STEPS) is None
    for step in (2, 4):
        validation(step, training.pipeline.denoiser)
    assert validation.best(STEPS) == best_step(validation.rows(STEPS)) == 4
    assert validation.best(3) == 2
    assert validation.best(1) is None
