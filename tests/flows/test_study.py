"""The studies' flow with stand-ins for the trainings: its inputs, its rows, its runs, and its deployments."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from flows.cli import app
from flows.processes import StageFailed
from flows.study import ablation, baselines, check_inputs, part_command, probe
from tests.tiny import PROVENANCE
from vdmini_core.artifacts import Plan, write_json
from vdmini_core.evaluation.study import LOSSES, Candidate, Candidates, Study

ROOT = Path(__file__).parents[2]
DVC = """
stages:
  prune:
    cmd: python -c "import pathlib; pathlib.Path('student.txt').write_text('pruned')"
    deps: [source.txt]
    outs: [student.txt]
"""
ROW = """
import os, pathlib, sys
part, folder = sys.argv[1], pathlib.Path("artifacts") / sys.argv[2]
(folder / "rows").mkdir(parents=True, exist_ok=True)
with open("calls.txt", "a") as calls:
    calls.write(f"{part} {os.environ['VDMINI_PARENT_RUN_ID']}\\n")
if pathlib.Path("fail.txt").exists() and part == "task+mca-seed0":
    sys.exit("no luck")
if part == "table":
    (folder / "table.md").write_text("the table")
    (folder / "plot.png").write_bytes(b"a picture")
elif not (folder / "rows" / f"{part}.json").exists():
    (folder / "rows" / f"{part}.json").write_text(part)
"""
ROWS = ["teacher", "pruned", *(f"{arm}-seed0" for arm in ("task", "task+icd", "task+mca", "task+icd+mca"))]


@pytest.fixture
def pruned(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose stage prune is up to date, and rows that take no time."""
    (project / "dvc.yaml").write_text(DVC)
    (project / "row.py").write_text(ROW)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True)
    monkeypatch.setattr("flows.study.part_command", lambda part, study: [sys.executable, "row.py", part, study.kind])
    return project


def calls(project: Path) -> list[list[str]]:
    return [line.split() for line in (project / "calls.txt").read_text().splitlines()]


def test_rows_are_made_under_one_parent_run_and_finished_ones_are_kept(pruned: Path, mlflow_file: str) -> None:
    assert ablation(seeds=1) == {**dict.fromkeys(ROWS, "made"), "table": "made"}
    assert [part for part, _ in calls(pruned)] == [*ROWS, "table"]
    (parent,) = {parent for _, parent in calls(pruned)}
    run = MlflowClient(tracking_uri=mlflow_file).get_run(parent)
    assert (run.info.run_name, run.info.status) == ("vdmini ablation", "FINISHED")
    assert run.data.tags["ablation.made"] == ", ".join([*ROWS, "table"])
    from prefect.artifacts import Artifact

    page = Artifact.get("ablation-table")
    assert page is not None
    assert page.data == "the table"
    assert Artifact.get("ablation-plot") is not None

    (pruned / "artifacts/ablation/rows/task+icd-seed0.json").unlink()
    again = ablation(seeds=1)
    assert [name for name, result in again.items() if result == "made"] == ["task+icd-seed0", "table"]


def test_a_row_that_fails_ends_the_ablation_by_name(pruned: Path, mlflow_file: str) -> None:
    (pruned / "fail.txt").write_text("")
    with pytest.raises(StageFailed, match=r"ablation 'task\+mca-seed0' failed \(exit code 1\)(.|\n)*no luck"):
        ablation(seeds=1)
    assert [part for part, _ in calls(pruned)] == ROWS[:5]
    run = MlflowClient(tracking_uri=mlflow_file).get_run(calls(pruned)[0][1])
    assert run.info.status == "FAILED"


def test_inputs_that_are_out_of_date_are_refused_with_the_command_that_makes_them(pruned: Path) -> None:
    check_inputs(pruned, "ablation")
    (pruned / "source.txt").write_text("another source")
    with pytest.raises(
        ValueError, match=r"prune is missing or out of date \(prune: source.txt modified\).*--target prune"
    ):
        ablation(seeds=1)
    (pruned / "student.txt").unlink()
    result = CliRunner().invoke(app, ["ablation"])
    assert result.exit_code == 2
    assert "student.txt deleted" in result.stderr
    assert not (pruned / "calls.txt").exists()


def test_a_row_is_a_process_that_is_told_its_part_and_the_study() -> None:
    study = Study(kind="ablation", arms=LOSSES, seeds=2, steps=5, clips=7)
    command = part_command("task-seed0", study)
    assert command[1:4] == ["-m", "tasks._study", "task-seed0"]
    assert Study.model_validate_json(command[4]) == study


@pytest.fixture
def planned(pruned: Path) -> Path:
    """The same with a plan whose stage is up to date."""
    numbers = dict.fromkeys(("teacher_parameters", "student_parameters", "teacher_flops", "student_flops"), 1)
    digests = dict.fromkeys(("report_digest", "teacher_digest"), "a")
    plan = Plan(method="optimal", removed=("M",), kept=(), provenance=PROVENANCE, **numbers, **digests)
    write_json(pruned / "artifacts/plan/plan.json", plan)
    (pruned / "dvc.yaml").write_text(DVC + DVC_PLAN)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], check=True)
    return pruned


DVC_PLAN = """
  plan:
    cmd: python -c "import pathlib; pathlib.Path('planned.txt').write_text('planned')"
    deps: [source.txt]
    outs: [planned.txt]
"""


def test_a_comparison_has_the_current_plan_and_every_baseline(planned: Path) -> None:
    rows = baselines(seeds=1)
    names = ["paper", "optimal", "uniform", "random", "magnitude", "depgraph-l2", "depgraph-taylor"]
    assert list(rows) == ["teacher", *(f"{n}-pruned" for n in names), *(f"{n}-seed0" for n in names), "table"]
    assert set(rows.values()) == {"made"}
    assert (planned / "artifacts/comparison/table.md").read_text() == "the table"


def test_a_probe_tries_the_first_plans_of_its_file(planned: Path) -> None:
    plans = tuple(Candidate(name=name, removed=("M",), predicted=0.1) for name in ("a", "b", "c"))
    write_json(planned / "candidates.json", Candidates(plans=plans))
    rows = probe("candidates.json", top=2)
    assert list(rows)[:4] == ["teacher", "paper-pruned", "a-pruned", "b-pruned"]
    assert [part for part in rows if part.endswith("seed0")] == ["paper-seed0", "a-seed0", "b-seed0"]


def test_a_file_that_is_no_list_of_plans_is_refused(planned: Path) -> None:
    (planned / "candidates.json").write_text('{"plans": [{"name": "a"}]}')
    result = CliRunner().invoke(app, ["probe", "candidates.json"])
    assert result.exit_code == 2
    assert "missing key 'plans.0.removed'" in " ".join(result.stderr.split())


def test_all_deployments_are_made_of_the_projects_own_file(prefect_server: str, tmp_path: Path) -> None:
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    for name in ("vdmini-local", "gpu"):
        body = json.dumps({"name": name, "type": "process", "base_job_template": template}).encode()
        urllib.request.urlopen(
            urllib.request.Request(f"{prefect_server}/work_pools/", body, {"Content-Type": "application/json"})
        )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": prefect_server}
    environment["PREFECT_PROFILES_PATH"] = str(tmp_path / "profiles.toml")
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        flow = "stage" if entry["name"] == "gpu" else "vdmini"
        with urllib.request.urlopen(f"{prefect_server}/deployments/name/{flow}/{entry['name']}") as answer:
            found = json.load(answer)
        assert found["entrypoint"] == entry["entrypoint"]
        given = {"order"} if flow == "stage" else set()  # comes with each run
        assert set(found["parameters"]) | given == set(found["parameter_openapi_schema"]["properties"])
