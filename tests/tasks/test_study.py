"""Rows and tables of studies for real, on a tiny teacher: what is kept, what goes on, what is refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tasks import _study
from tasks._study import run_part
from tasks.distill import Pruned
from tests.evaluation.test_report import make_sensitivity
from tests.tiny import PROVENANCE, write_latents, write_pipeline
from vdmini_core.artifacts import Plan, read_json, write_json
from vdmini_core.distillation.preflight import DoesNotFit
from vdmini_core.evaluation.foresight import Foresight
from vdmini_core.evaluation.study import LOSSES, PAPER, Arm, Part, Ranking, Study, StudyRow
from vdmini_core.models import load_denoiser
from vdmini_core.models.verify import verify_teacher
from vdmini_core.pruning.baselines import StudentFacts, without_units
from vdmini_core.pruning.surgery import prune
from vdmini_core.settings import load_params
from vdmini_core.training.loop import Interrupted

SETTINGS = Study(kind="ablation", arms=LOSSES, seeds=1, steps=2, clips=2)
PARAMS = {
    "distill": {
        "loop": {"seed": 3, "max_steps": 50, "batch_size": 2, "warmup_steps": 0, "checkpoint_every": 1, "log_every": 1},
        "discriminator": {"warmup_steps": 0, "ramp_steps": 1},
    },
    "evaluate": {"steps": 1, "batch_size": 2},
}


def write_project(folder: Path) -> None:
    """What stage prune and those before it leave of a tiny teacher, and params.yaml."""
    artifacts = folder / "artifacts"
    manifest = verify_teacher(str(write_pipeline(folder / "model")), None)
    write_json(artifacts / "teacher" / "teacher.json", manifest)
    cache = write_latents(artifacts / "encode", 6, size=8).manifest
    both = {"train": cache.shards["test"], "test": cache.shards["test"]}
    write_json(artifacts / "encode" / "latents.json", cache.model_copy(update={"shards": both}))
    denoiser = load_denoiser(folder / "model" / "unet")
    removed = ("D.0.1", "U.3.1")
    plan = Plan(
        method="manual",
        removed=removed,
        kept=tuple(unit.name for unit in denoiser.units if unit.name not in removed),
        teacher_parameters=1,
        student_parameters=1,
        teacher_flops=1,
        student_flops=1,
        report_digest="r",
        teacher_digest=manifest.digest,
        provenance=PROVENANCE,
    )
    write_json(artifacts / "plan" / "plan.json", plan)
    prune(denoiser, manifest, plan, artifacts / "prune", torch.float32)
    sensitivity = make_sensitivity()
    scores = tuple(sensitivity.scores[-1].model_copy(update={"name": unit.name}) for unit in denoiser.units)
    write_json(artifacts / "sensitivity" / "report.json", sensitivity.model_copy(update={"scores": scores}))
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    write_project(folder)
    return folder


@pytest.fixture(autouse=True)
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    yield project
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def row_path(part: str, study: Study = SETTINGS) -> Path:
    return _study.row_path(study, part)


def row(part: str, study: Study = SETTINGS) -> StudyRow:
    return read_json(row_path(part, study), StudyRow)


def checkpoints(project: Path) -> list[str]:
    return sorted(path.name for path in (project / ".scratch/studies").glob("*/step-*"))


def test_rows_are_made_once_and_again_only_where_something_changed(project: Path) -> None:
    run_part("task-seed3", SETTINGS)
    run_part("task+icd-seed3", SETTINGS)
    first = row("task-seed3")
    assert (first.arm, first.seed, first.steps) == ("task", 3, 2)
    assert first.parameters == row("task+icd-seed3").parameters > 0
    told = [row(part).provenance.params for part in ("task-seed3", "task+icd-seed3")]
    assert [(params["icd_weight"], params["mca_weight"]) for params in told] == [(0, 0), (0.1, 0)]
    assert first.quality != row("task+icd-seed3").quality
    assert first.protocol["clips"] == first.quality.clips == 2
    assert first.protocol_digest == row("task+icd-seed3").protocol_digest
    assert set(first.provenance.inputs) == {"teacher", "pruned", "latents", "code", "process"}
    assert first.provenance.params["loop"]["max_steps"] == 2
    assert checkpoints(project) == []

    written = row_path("task-seed3").read_bytes()
    run_part("task-seed3", SETTINGS)
    assert row_path("task-seed3").read_bytes() == written
    run_part("task-seed3", SETTINGS.model_copy(update={"steps": 1}))
    assert row("task-seed3").steps == 1
    assert row("task-seed3").fingerprint != first.fingerprint
    run_part("task-seed3", SETTINGS)
    assert row("task-seed3").quality == first.quality


def test_an_interrupted_training_goes_on_from_its_checkpoint_to_the_same_row(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = SETTINGS.model_copy(update={"steps": 3})
    run_part("task+icd+mca-seed3", longer)
    whole = row("task+icd+mca-seed3")
    row_path("task+icd+mca-seed3").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("tasks._stage.Context.should_stop", lambda context: True)
        with pytest.raises(Interrupted, match="stopped after step 1"):
            run_part("task+icd+mca-seed3", longer)
    assert checkpoints(project) == ["step-00000001"]
    assert not row_path("task+icd+mca-seed3").exists()
    run_part("task+icd+mca-seed3", longer)
    assert row("task+icd+mca-seed3").quality == whole.quality
    history = (project / ".scratch/tracking/ablation/task+icd+mca-seed3/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in history if "train/student/task" in line]
    assert steps == [1, 2]
    assert checkpoints(project) == []


def test_a_row_of_a_process_is_a_child_run_and_the_table_has_all_rows(project: Path) -> None:
    from mlflow import MlflowClient

    from tasks._tracking import finish_parent, start_parent

    parent = start_parent("ablation")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "VDMINI_PARENT_RUN_ID": str(parent)}
    command = [sys.executable, "-m", "tasks._study", "pruned", SETTINGS.model_dump_json()]
    subprocess.run(command, env=environment, check=True)
    finish_parent(parent, "FINISHED", {}, {})
    assert (row("pruned").seed, row("pruned").steps) == (None, 0)
    client = MlflowClient(tracking_uri=f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("vdmini")
    found = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert [run.info.run_name for run in found] == ["ablation pruned"]
    assert "quality/content_distance" in found[0].data.metrics

    for part in SETTINGS.parts(3):
        run_part(part, SETTINGS)
    assert row("teacher").quality != row("pruned").quality
    run_part("table", SETTINGS)
    report = json.loads((project / "artifacts/ablation/report.json").read_text())
    assert [arm["arm"] for arm in report["arms"]] == ["task", "task+icd", "task+mca", "task+icd+mca"]
    assert len(report["rows"]) == 6
    assert report["provenance"]["commit"]
    assert "| task+icd+mca minus task |" in (project / "artifacts/ablation/table.md").read_text()
    assert (project / "artifacts/ablation/plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("stage", ["teacher", "encode", "plan", "prune"])
def test_a_missing_input_is_named_with_the_command_that_makes_it(project: Path, stage: str) -> None:
    folder = project / "artifacts" / stage
    folder.rename(project / "away")
    try:
        with pytest.raises(FileNotFoundError, match=f"artifacts/{stage} does not exist; run `dvc repro {stage}` first"):
            run_part("task+mca-seed3", SETTINGS.model_copy(update={"steps": 1}))
    finally:
        (project / "away").rename(folder)


def test_a_training_that_cannot_fit_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.distill.memory_there", lambda device: 10**6)
    loaded: list[object] = []
    monkeypatch.setattr("tasks.distill.load_pipeline", lambda *args: loaded.append(args))
    monkeypatch.setattr("tasks.distill.load_denoiser", lambda *args: loaded.append(args))
    with pytest.raises(DoesNotFit, match=r"this device \(CPU\) has 0.001 GB"):
        run_part("task+mca-seed3", SETTINGS.model_copy(update={"steps": 4}))  # no test before this made that row
    assert loaded == []


def test_the_check_can_be_switched_off_and_changes_no_result(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_part("task-seed3", SETTINGS)
    fingerprint = row("task-seed3").fingerprint
    row_path("task-seed3").unlink()
    monkeypatch.setattr("tasks.distill.memory_there", lambda device: 10**6)
    (project / "params.yaml").write_text(
        yaml.safe_dump({**PARAMS, "distill": {**PARAMS["distill"], "memory_check": False}})
    )
    try:
        run_part("task-seed3", SETTINGS)
    finally:
        (project / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    assert row("task-seed3").fingerprint == fingerprint


def test_a_loss_without_weight_is_refused(project: Path) -> None:
    (project / "params.yaml").write_text(yaml.safe_dump({**PARAMS, "distill": {**PARAMS["distill"], "icd_weight": 0}}))
    try:
        with pytest.raises(ValueError, match=r"distill\.icd_weight is 0"):
            run_part("task-seed3", SETTINGS)
    finally:
        (project / "params.yaml").write_text(yaml.safe_dump(PARAMS))


def facts(study: Study, folder: str) -> StudentFacts:
    return read_json(Path("artifacts") / study.kind / "students" / folder / "student.json", StudentFacts)


def test_a_probe_makes_its_students_trains_them_alike_and_ranks_them(project: Path) -> None:
    middle = Arm(name="middle", method="units", removed=("M",), predicted=0.5)
    study = Study(kind="probe", arms=(PAPER, middle), seeds=1, steps=1, clips=2)
    for part in (*study.parts(3), "table"):
        run_part(part, study)
    ranking = read_json(project / "artifacts/probe/ranking.json", Ranking)
    assert {plan.name: plan.predicted for plan in ranking.plans} == {"paper": None, "middle": 0.5}
    assert {plan.name: plan.removed for plan in ranking.plans}["middle"] == ("M",)
    assert "D.3.0" in facts(study, "paper").removed
    assert ranking.plans[0].recovered >= ranking.plans[1].recovered
    assert row("paper-seed3", study).parameters < row("middle-pruned", study).parameters
    assert row("teacher", study).parameters > row("middle-pruned", study).parameters
    assert row("middle-pruned", study).steps == 0
    page = (project / "artifacts/probe/table.md").read_text()
    assert "| rank | plan |" in page
    assert "| content damage |" in page
    assert read_json(project / "artifacts/probe/foresight.json", Foresight).students == 2
    assert facts(study, "middle").parameters == row("middle-seed3", study).parameters


def student_of(arm: Arm, seed: int | None = None) -> Pruned:
    study = Study(kind="comparison", arms=(arm,), seeds=1, steps=1, clips=2)
    context = _study.context_of(load_params(Path("params.yaml")), Part(arm, seed), study)
    return _study.pruned_of(context, arm, seed, study)


def test_a_student_is_made_once_and_again_only_where_its_method_or_inputs_changed(project: Path) -> None:
    arm = Arm(name="one", method="units", removed=("M",))
    first = student_of(arm)
    written = (first.folder / "config.json").stat().st_mtime_ns
    assert student_of(arm, seed=7) == first
    assert (first.folder / "config.json").stat().st_mtime_ns == written
    again = student_of(arm.model_copy(update={"removed": ("D.0.1", "U.3.1")}))
    assert (again.folder, again.removed) == (first.folder, ("D.0.1", "U.3.1"))
    assert (first.folder / "config.json").stat().st_mtime_ns > written


def test_a_random_student_is_another_one_each_seed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removals = {3: ("M",), 4: ("D.0.1", "U.3.1")}
    monkeypatch.setattr(_study, "student_by", lambda method, pruning: without_units(pruning, removals[pruning.seed]))
    arm = Arm(name="random", method="random")
    made = [student_of(arm, seed) for seed in (3, 4, None)]
    assert [pruned.folder.parent.name for pruned in made] == ["random-seed3", "random-seed4", "random-seed3"]
    assert [pruned.removed for pruned in made] == [removals[3], removals[4], removals[3]]


def test_a_student_with_fewer_channels_is_recovered_with_every_loss_and_reloads(project: Path) -> None:
    arm = Arm(name="depgraph-l2", method="depgraph-l2")
    study = Study(kind="comparison", arms=(arm,), seeds=1, steps=2, clips=2)
    run_part("depgraph-l2-seed3", study)
    made = facts(study, "depgraph-l2")
    assert made.removed == ()
    assert all(len(channels) < 32 for channels in made.channels.values())
    assert row("depgraph-l2-seed3", study).parameters == made.parameters
    log = (project / ".scratch/tracking/comparison/depgraph-l2-seed3/metrics.jsonl").read_text()
    assert all(f"train/student/{loss}" in log for loss in ("task", "icd", "mca"))
    assert checkpoints(project) == []
