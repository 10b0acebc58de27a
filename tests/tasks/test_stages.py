"""Every stage for real on the built-in teacher, with budgets of seconds, in one temporary project."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from flows.cli import app
from tasks._lineage import lineage_of
from tasks._part import run_part
from tasks._stage import STAGES, run_stage
from tests import planted
from vdmini_core.artifacts import (
    DataManifest,
    DecoderReport,
    EvaluationReport,
    Plan,
    SensitivityReport,
    TeacherManifest,
    ValidationReport,
    folder_digest,
    read_json,
)
from vdmini_core.models import IllegalPlan, UnusableModel, load_denoiser
from vdmini_core.training.checkpoint import CheckpointManifest

PARAMS = {
    "data": {"groups_per_class": 3},
    "encode": {"train_clips": 24, "test_clips": 12},
    "sensitivity": {"clips": 2, "steps": 1, "latency_runs": 1, "gate_clips": 4, "calibration_clips": 2},
    "distill": {
        "loop": {"max_steps": 6, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 1, "log_every": 1},
        "discriminator": {"warmup_steps": 1, "ramp_steps": 2},
    },
    "decoder": {
        "clips": 1,
        "latency_runs": 1,
        "validation": {"every": 2, "clips": 2},
        "loop": {"max_steps": 2, "batch_size": 2, "warmup_steps": 1, "precision": "fp32", "log_every": 1},
    },
    "evaluate": {"clips": 4, "steps": 1, "gallery": 1},
    "register": {"min_content_recovery": -100.0, "min_motion_recovery": -100.0},
}


def write_params(folder: Path, **changes: dict[str, object]) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump({**PARAMS, **changes}))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder in which every stage has run once, in order."""
    folder = tmp_path_factory.mktemp("project")
    write_params(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", **planted.SECRETS}.items():
            patch.setenv(name, value)
        for stage in STAGES:
            run_stage(stage)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return folder


def test_no_stage_and_no_registration_writes_a_secret_of_the_environment(project: Path) -> None:
    assert planted.files_with_secrets(project) == []
    (project / "leak.txt").write_text(f"token={planted.SECRETS['HF_TOKEN']}")
    assert planted.files_with_secrets(project) == ["leak.txt: HF_TOKEN"]
    (project / "leak.txt").unlink()


def test_the_registered_version_leads_to_every_fact(inside: Path) -> None:
    found = lineage_of("models:/vdmini@champion")
    assert found.params == (inside / "params.yaml").read_text()
    assert found.stages is not None
    assert list(found.stages) == list(STAGES)
    runs = [run.run_id for run in found.stages.values()]
    assert len(set(runs)) == len(STAGES)
    assert found.stages["distill"].threads == torch.get_num_threads()
    assert found.results.model_digest == folder_digest(inside / "artifacts/register/model")
    assert "unet/diffusion_pytorch_model.safetensors" in (found.results.model_files or {})
    assert set(found.missing()) == {"commit", "changed", "dvc_lock"}  # this folder has neither git nor DVC


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    return project


def test_data_lists_real_encoded_videos_in_the_ucf101_layout(project: Path) -> None:
    manifest = read_json(project / "artifacts/data/manifest.json", DataManifest)
    assert manifest.layout == "ucf101"
    assert len(manifest.clips) == 216 * 3
    assert not manifest.skipped
    assert all((project / manifest.root / clip.path).suffix == ".avi" for clip in manifest.clips)


def test_teacher_records_the_digest_of_every_weight_file(project: Path) -> None:
    manifest = read_json(project / "artifacts/teacher/teacher.json", TeacherManifest)
    assert sorted(name.split("/")[0] for name in manifest.digests) == ["image_encoder", "unet", "vae"]
    assert manifest.blocks == ("D.0", "D.1", "D.2", "D.3", "M", "U.0", "U.1", "U.2", "U.3")


def test_sensitivity_scores_every_block_and_every_pair(project: Path) -> None:
    report = read_json(project / "artifacts/sensitivity/report.json", SensitivityReport)
    assert [s.name for s in report.scores if s.kind == "block"] == list(
        read_json(project / "artifacts/teacher/teacher.json", TeacherManifest).blocks
    )
    assert sum(s.kind == "pair" for s in report.scores) == 20
    assert all(s.parameters > 0 and s.flops > 0 and s.latency_ms > 0 for s in report.scores)
    assert [s.name for s in report.scores if s.replaced] == ["D.1", "U.3", "D.1.0", "U.3.0"]
    assert 0 < report.forward_flops < report.naive_forward_flops
    assert not (project / ".scratch/sensitivity").exists() or not list((project / ".scratch/sensitivity").iterdir())
    assert all((project / "artifacts/sensitivity" / name).is_file() for name in ("sensitivity.png", "depth.png"))


def test_the_paper_layout_removes_at_least_38_percent(project: Path) -> None:
    plan = read_json(project / "artifacts/plan/plan.json", Plan)
    student = load_denoiser(project / "artifacts/prune/denoiser")
    assert sum(p.numel() for p in student.model.parameters()) == plan.student_parameters
    assert plan.student_parameters <= 0.62 * plan.teacher_parameters


def test_a_finished_report_gives_another_plan_without_measuring_again(project: Path, inside: Path) -> None:
    assert (inside / "artifacts/plan/plan.png").stat().st_size > 10_000
    made = read_json(inside / "artifacts/plan/plan.json", Plan)
    before = folder_digest(inside / "artifacts")
    result = CliRunner().invoke(app, ["plan", "--latency-ratio", ".7", "--protect", "U.1", "--json"])
    assert result.exit_code == 0, result.output
    plan = Plan.model_validate_json(result.stdout)
    assert plan.predicted.latency <= 0.7
    assert plan.student_parameters / plan.teacher_parameters == plan.predicted.parameters
    assert (plan.teacher_parameters, plan.teacher_flops) == (made.teacher_parameters, made.teacher_flops)
    assert not any(name.startswith("U.1") for name in plan.removed)
    refused = CliRunner().invoke(app, ["plan", "--parameter-ratio", ".001"])
    assert refused.exit_code == 2
    assert "the nearest possible budget is 0." in refused.stderr
    assert folder_digest(inside / "artifacts") == before


def test_distillation_changes_the_student_and_keeps_its_history(project: Path) -> None:
    assert folder_digest(project / "artifacts/distill/denoiser") != folder_digest(project / "artifacts/prune/denoiser")
    rows = json.loads((project / "artifacts/distill/history.json").read_text())["rows"]
    assert [row["step"] for row in rows] == list(range(6))
    assert {"train/student/task", "train/student/icd", "train/student/mca", "train/discriminator/total"} <= set(rows[0])


def test_evaluation_has_three_rows_a_floor_and_a_page(project: Path) -> None:
    report = read_json(project / "artifacts/evaluate/report.json", EvaluationReport)
    assert [row.name for row in report.rows] == ["teacher", "pruned", "recovered"]
    assert all(row.latency.runs >= 30 and row.peak_memory_bytes > 0 for row in report.rows)
    assert report.floor.content_distance > 0
    assert all({"content_accuracy", "motion_diversity"} <= set(row.intervals) for row in report.rows)
    assert all({"psnr", "ssim", "flow_error", "flow_ratio"} <= set(row.intervals) for row in report.rows[1:])
    assert {tuple(row.stages) for row in report.rows} == {("encoder", "denoiser", "vae_decode", "end_to_end")}
    found = [(corner.denoiser, corner.decoder) for corner in report.corners]
    assert found == [(a, b) for a in ("teacher", "recovered") for b in ("original", "compressed")]
    assert report.corners[0].quality == report.rows[0].quality
    assert report.corners[2].quality == report.rows[2].quality
    assert all(corner.stages["end_to_end"].median_ms > 0 for corner in report.corners)
    assert "| recovered | compressed |" in (project / "artifacts/evaluate/summary.md").read_text()
    metrics = json.loads((project / "artifacts/evaluate/metrics.json").read_text())
    assert metrics["paired/ssim/pruned"] == report.rows[1].intervals["ssim"].value
    assert "<video" in (project / "artifacts/evaluate/report.html").read_text()


def test_the_registered_pipeline_has_the_compressed_decoder(project: Path) -> None:
    model, decoder = project / "artifacts/register/model", project / "artifacts/decoder"
    assert folder_digest(model / "vae") == folder_digest(decoder / "vae")
    plan = read_json(decoder / "decoder.json", DecoderReport).plan
    assert plan.predicted_ratio is not None
    assert plan.predicted_ratio <= 0.45
    assert json.loads((model / "model_index.json").read_text())["vae"] == [
        "vdmini_core.models.decoder",
        "VDMiniAutoencoderKLTemporalDecoder",
    ]


def test_a_registered_student_generates_a_clip(inside: Path) -> None:
    from tasks._generate import generate
    from vdmini_core.data.video import read_clip

    generate(
        "models:/vdmini@champion",
        inside / "artifacts/evaluate/clips/first-0.png",
        inside / "clip.mp4",
        frames=None,
        steps=1,
        seed=0,
    )
    assert read_clip(inside / "clip.mp4", frames=8, fps=None, size=64).shape == (8, 64, 64, 3)


def test_a_replaced_model_folder_is_refused_by_its_digest(inside: Path) -> None:
    from tasks._generate import model_folder

    extra = inside / "artifacts/register/model/changed.txt"
    extra.write_text("changed")
    try:
        with pytest.raises(ValueError, match="its digest differs"):
            model_folder("models:/vdmini@champion")
    finally:
        extra.unlink()


def test_a_student_below_the_gate_is_not_registered_and_says_why(inside: Path) -> None:
    verdict = (inside / "artifacts/register/verdict.json").read_text()
    write_params(inside, register={"min_parameter_reduction": 0.9})
    try:
        run_stage("register")
        refused = json.loads((inside / "artifacts/register/verdict.json").read_text())
        assert refused["version"] is None
        assert "register.min_parameter_reduction is 0.9" in refused["failed"][0]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write_params(inside)
        (inside / "artifacts/register/verdict.json").write_text(verdict)


def test_distillation_killed_midway_resumes_to_the_same_weights(project: Path, inside: Path) -> None:
    whole = folder_digest(project / "artifacts/distill/denoiser")
    checkpoints = next((project / ".scratch/checkpoints").iterdir())
    for old in checkpoints.iterdir():
        if old.is_dir():
            subprocess.run(["rm", "-r", str(old)], check=True)
    command = [sys.executable, "-m", "tasks._stage", "distill"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(command, env=environment)
    while not (checkpoints / "step-00000002").exists() and child.poll() is None:
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert not (checkpoints / "step-00000006").exists(), "killed too late to test anything"
    subprocess.run(["rm", "-r", "artifacts/distill"], check=True)
    subprocess.run(command, env=environment, check=True)
    assert folder_digest(project / "artifacts/distill/denoiser") == whole


WATCHED = {**PARAMS["distill"], "validation": {"every": 2, "clips": 2, "steps": 1}}


def test_a_watched_distillation_leaves_its_rows_a_page_and_pictures(project: Path, inside: Path) -> None:
    whole = folder_digest(project / "artifacts/distill/denoiser")
    (trained,) = (inside / ".scratch/checkpoints").iterdir()
    shutil.rmtree(trained)
    alarms = {"motion_collapse": 1000.0}
    distill = {**WATCHED, "keep": "best", "validation": {**WATCHED["validation"], "alarms": alarms}}
    write_params(inside, distill=distill)
    try:
        run_stage("distill")
        report = read_json(inside / "artifacts/distill/validation.json", ValidationReport)
        page = (inside / "artifacts/distill/validation.md").read_text()
        best = read_json(trained / f"step-{report.best:08d}/checkpoint.json", CheckpointManifest)
        store = MlflowClient(f"sqlite:///{inside}/mlflow.db")
        experiment = store.get_experiment_by_name("vdmini").experiment_id
        run = store.search_runs([experiment], "attributes.run_name = 'distill'", order_by=["start_time DESC"])[0]
        shutil.rmtree(inside / "artifacts/distill")
        write_params(inside)
        run_stage("distill")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write_params(inside)
    assert [row.step for row in report.rows] == [2, 4, 6]
    assert [alarm.name for alarm in report.alarms if alarm.name == "motion_collapse"] == ["motion_collapse"]
    assert best.step == report.best
    assert "- **motion_collapse**, step 2: " in page
    assert f"| {report.best} (best) |" in page
    assert run.data.tags["alarm.motion_collapse"].startswith("step 2: ")
    assert run.data.metrics["validation/score"] == report.rows[-1].score
    found = store.list_artifacts(run.info.run_id, "validation")
    assert [file.path for file in found] == [f"validation/clips-{step:08d}.png" for step in (2, 4, 6)]
    # Unwatched, the same command goes on from the watched run's checkpoint, to what it was without.
    assert folder_digest(project / "artifacts/distill/denoiser") == whole
    assert not (project / "artifacts/distill/validation.json").exists()


@pytest.mark.parametrize("stage", ["distill", "evaluate"])
def test_validation_is_refused_where_other_stages_use_all_test_clips(inside: Path, stage: str) -> None:
    write_params(inside, distill={**WATCHED, "validation": {**WATCHED["validation"], "clips": 6}})
    try:
        with pytest.raises(ValueError, match=r"of the 12 that are encoded .* first 8; set encode\.test_clips to 14"):
            run_stage(stage)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write_params(inside)


def test_distillation_under_a_launcher_is_one_run_of_two_processes(inside: Path) -> None:
    changed = {**PARAMS["distill"], "loop": {**PARAMS["distill"]["loop"], "seed": 1}}
    write_params(inside, distill=changed, resources={"distill": {"launcher": "accelerate", "gpus": 2}})
    tracked = inside / ".scratch/tracking/distill/metrics.jsonl"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "0", "-m", "flows.cli", "stage"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    try:
        subprocess.run([sys.executable, "-m", "flows.cli", "stage", "distill"], env=environment, check=True)
    finally:
        write_params(inside)
    assert tracked.read_text().count('"metrics"') == 6
    rows = json.loads((inside / "artifacts/distill/history.json").read_text())["rows"]
    assert [row["step"] for row in rows] == list(range(6))
    assert load_denoiser(inside / "artifacts/distill/denoiser").units
    other = subprocess.run([*launch, "plan"], env=environment, capture_output=True, text=True)
    assert "stage plan runs in one process; start it without a launcher" in other.stderr


def test_sensitivity_in_parts_says_what_one_process_says(inside: Path) -> None:
    before = read_json(inside / "artifacts/sensitivity/report.json", SensitivityReport)
    try:
        for index in range(2):
            run_part("sensitivity", {"round": 0, "index": index, "of": 2})
        (scratch,) = (inside / ".scratch/sensitivity").iterdir()
        measured = {file.name.removesuffix(".0.safetensors") for file in scratch.glob("*.safetensors")}
        assert measured == {score.name for score in before.scores} | {"intact"}
        with pytest.raises(ValueError, match="stage plan has no parts"):
            run_part("plan", {"round": 0, "index": 0, "of": 2})
        run_stage("sensitivity")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    after = read_json(inside / "artifacts/sensitivity/report.json", SensitivityReport)
    assert len(after.scores) == len(before.scores)
    for score, other in zip(after.scores, before.scores, strict=True):
        assert (score.name, score.content, score.motion, score.quality) == (
            other.name,
            other.content,
            other.motion,
            other.quality,
        )


def test_dvc_and_mlflow_show_the_same_names(project: Path, tmp_path: Path) -> None:
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    runs = {
        run.info.run_name: run.data.metrics
        for run in client.search_runs(
            [client.get_experiment_by_name("vdmini").experiment_id], order_by=["attributes.start_time DESC"]
        )
    }
    recipe = yaml.safe_load((Path(__file__).parents[2] / "dvc.yaml").read_text())
    for name in ("evaluate/metrics.json", "distill/history.json"):
        (tmp_path / "artifacts" / name).parent.mkdir(parents=True)
        shutil.copy(project / "artifacts" / name, tmp_path / "artifacts" / name)
    (tmp_path / "dvc.yaml").write_text(
        yaml.safe_dump({"plots": recipe["plots"], "metrics": recipe["stages"]["evaluate"]["metrics"]})
    )

    def dvc(*words: str) -> str:
        command = [sys.executable, "-m", "dvc", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    dvc("init", "--no-scm", "-q")
    metrics = json.loads(dvc("metrics", "show", "--json"))[""]["data"]["artifacts/evaluate/metrics.json"]["data"]
    assert metrics == pytest.approx(runs["evaluate"])
    plots = json.loads(dvc("plots", "show", "--json"))["data"]
    drawn = {name for name, plot in plots.items() if plot}
    assert {"train/student/total", "train/student/task", "train/discriminator/total"} <= drawn
    assert drawn <= set(runs["distill"])


def test_an_illegal_plan_is_refused_before_anything_is_written(inside: Path) -> None:
    write_params(inside, plan={"method": "manual", "remove": ["D.0.1"]})
    try:
        with pytest.raises(IllegalPlan, match=r"removing D\.0\.1 leaves"):
            run_stage("plan")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write_params(inside)


def test_a_missing_teacher_folder_is_refused(inside: Path) -> None:
    write_params(inside, teacher={"source": "/nowhere/svd"})
    try:
        with pytest.raises(UnusableModel, match=r"teacher\.source '/nowhere/svd'"):
            run_stage("teacher")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write_params(inside)


def test_an_unknown_stage_lists_the_known_ones(inside: Path) -> None:
    with pytest.raises(ValueError, match="data, teacher, encode"):
        run_stage("nothing")
