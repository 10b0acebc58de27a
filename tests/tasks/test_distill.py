"""Stage distill on a tiny pipeline folder: when the teacher is loaded, and what is kept of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import distill
from tasks._stage import Context
from tests.tiny import PROVENANCE, new_unet, write_latents
from vdmini_core.artifacts import Plan, write_json
from vdmini_core.models.verify import verify_teacher
from vdmini_core.pruning.surgery import save_model
from vdmini_core.settings import DistillSettings, LoopSettings, Params

REMOVED = ("D.0.1", "U.3.1")
LOOP = {"max_steps": 2, "batch_size": 2, "warmup_steps": 0, "precision": "fp32", "log_every": 1}
TEACHER_ALONE = {"target": "teacher", "icd_weight": 0.0, "mca_weight": 0.0}


class Loaded:
    """`load_pipeline` of the stage, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, load = 0, distill.load_pipeline

        def counted(*args: Any) -> Any:
            self.times += 1
            return load(*args)

        monkeypatch.setattr(distill, "load_pipeline", counted)


@pytest.fixture
def project(tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    artifacts = tmp_path / "artifacts"
    write_json(artifacts / "teacher/teacher.json", verify_teacher(str(tiny_pipeline_folder), None))
    write_latents(artifacts / "encode", 4, size=8, split="train")
    numbers = dict.fromkeys(("teacher_parameters", "student_parameters", "teacher_flops", "student_flops"), 1)
    digests = dict.fromkeys(("report_digest", "teacher_digest"), "a")
    plan = Plan(method="manual", removed=REMOVED, kept=(), provenance=PROVENANCE, **numbers, **digests)
    write_json(artifacts / "plan/plan.json", plan)
    save_model(new_unet().without(REMOVED), artifacts / "prune/denoiser")
    return tmp_path


def run(**changes: Any) -> list[dict[str, float]]:
    """The stage's history with these settings."""
    params = Params.model_validate({"distill": {"loop": LOOP} | changes})
    tracker: Any = type("Tracker", (), {"log": lambda self, metrics, step: None})()
    distill.run(Context("distill", params, tracker, torch.device("cpu")))
    return json.loads(Path("artifacts/distill/history.json").read_text())["rows"]  # type: ignore[no-any-return]


def test_a_teacher_whose_answers_are_kept_is_not_loaded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(monkeypatch)
    first = run(**TEACHER_ALONE, teacher_draws=2)
    assert loaded.times == 1
    kept = sorted((project / ".scratch/answers").glob("*/*"))
    assert [path.name for path in kept] == [f"clip-{clip:07d}.safetensors" for clip in range(4)]
    other = run(**TEACHER_ALONE, teacher_draws=2, learning_rate=0.1)
    assert loaded.times == 1
    assert other[0] == first[0]
    assert other[1]["train/student/task"] != first[1]["train/student/task"]
    kept[2].unlink()
    run(**TEACHER_ALONE, teacher_draws=2, learning_rate=0.2)
    assert loaded.times == 2
    run(**TEACHER_ALONE | {"mca_weight": 1.0}, teacher_draws=2)  # the heads read its encoder
    assert loaded.times == 3


def test_without_draws_the_teacher_runs_in_every_step(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(monkeypatch)
    run(**TEACHER_ALONE)
    assert loaded.times == 1
    assert not (project / ".scratch/answers").exists()


@pytest.mark.parametrize(("distance", "same"), [("l2", True), ("normalised", False)])
def test_parts_of_a_batch_are_another_training_for_the_normalised_distance_alone(distance: str, same: bool) -> None:
    loops = (LoopSettings(max_steps=1, batch_size=4, accumulate=parts) for parts in (1, 2))
    whole, halves = (distill.fingerprint_of(DistillSettings(loop=loop, icd_distance=distance), {}) for loop in loops)
    assert (whole == halves) is same
