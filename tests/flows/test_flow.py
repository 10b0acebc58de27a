"""The flow over a tiny DVC project: order, what DVC did, failure, cancellation."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from flows import services
from flows.full import vdmini
from flows.graph import stage_graph
from flows.processes import StageFailed, read_lines

ROOT = Path(__file__).parents[2]


def newest_run(uri: str) -> Run:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("vdmini")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], max_results=1)
    return run


def edit_stage(project: Path, old: str, new: str) -> None:
    text = (project / "dvc.yaml").read_text()
    assert old in text
    (project / "dvc.yaml").write_text(text.replace(old, new))


def test_order_and_edges_are_those_of_dvc(project: Path) -> None:
    graph = stage_graph(project)
    assert list(graph) == ["first", "middle", "last"]
    assert graph == {"first": (), "middle": ("first",), "last": ("middle",)}
    assert list(stage_graph(project, "middle")) == ["first", "middle"]
    with pytest.raises(ValueError, match="one of the stages first, middle, last, got target 'decoder'"):
        stage_graph(project, "decoder")


def test_stages_run_once_then_are_skipped_and_restored_from_the_cache(project: Path, mlflow_file: str) -> None:
    assert vdmini() == {"first": "ran", "middle": "ran", "last": "ran"}
    assert (project / "last.txt").read_text() == "first source middle last"
    assert vdmini() == {"first": "skipped", "middle": "skipped", "last": "skipped"}
    (project / "middle.txt").unlink()
    assert vdmini() == {"first": "skipped", "middle": "restored", "last": "skipped"}
    run = newest_run(mlflow_file)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage.middle"] == "restored"
    assert len(run.data.tags["lock.middle"]) == 64
    assert len(run.data.tags["git.commit"]) == 40


def test_dvc_finds_nothing_to_do_after_the_flow(project: Path) -> None:
    vdmini()
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], capture_output=True, text=True, check=True)
    assert "up to date" in done.stdout
    assert "Running stage" not in done.stdout


def test_a_change_runs_again_only_what_it_reaches(project: Path) -> None:
    vdmini()
    edit_stage(project, "' middle'", "' centre'")
    assert vdmini() == {"first": "skipped", "middle": "ran", "last": "ran"}
    assert (project / "last.txt").read_text() == "first source centre last"


def test_a_target_stops_the_flow_there(project: Path) -> None:
    assert vdmini("middle") == {"first": "ran", "middle": "ran"}
    assert not (project / "last.txt").exists()


def test_a_failing_stage_fails_the_flow_by_name_and_stops_it(project: Path, mlflow_file: str) -> None:
    edit_stage(project, "open('middle.txt', 'w')", "print('the reason'); 1 / 0; open('middle.txt', 'w')")
    with pytest.raises(StageFailed, match=r"stage 'middle' failed(.|\n)*the reason(.|\n)*ZeroDivisionError"):
        vdmini()
    assert not (project / "last.txt").exists()
    run = newest_run(mlflow_file)
    assert run.info.status == "FAILED"
    assert run.data.tags["stage.first"] == "ran"
    assert "stage.last" not in run.data.tags


def test_wrong_settings_stop_the_flow_before_any_stage(project: Path) -> None:
    (project / "params.yaml").write_text("distill: {loop: {max_steps: 1, batch_size: 1}, epochs: 3}\n")
    with pytest.raises(ValueError, match=r"distill\.epochs"):
        vdmini()
    assert not (project / "first.txt").exists()


def test_a_stage_inherits_the_parent_run_and_its_results_are_published(project: Path, mlflow_file: str) -> None:
    program = "import os, pathlib; p = pathlib.Path('artifacts/evaluate'); p.mkdir(parents=True); "
    program += "(p / 'metrics.json').write_text('{\"quality/content\": 0.75}'); "
    program += "(p / 'summary.md').write_text('parent ' + os.environ['VDMINI_PARENT_RUN_ID'])"
    (project / "evaluate.py").write_text(program)
    with (project / "dvc.yaml").open("a") as stream:
        stream.write("  evaluate:\n    cmd: python evaluate.py\n    deps: [last.txt]\n    outs: [artifacts/evaluate]\n")
    vdmini()
    run = newest_run(mlflow_file)
    assert run.data.metrics == {"quality/content": 0.75}
    assert (project / "artifacts/evaluate/summary.md").read_text() == f"parent {run.info.run_id}"
    from prefect.artifacts import Artifact

    page = Artifact.get("evaluate-summary")
    assert page is not None
    assert page.data == f"parent {run.info.run_id}"


def command_line(project: Path, server: str, *words: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": server}
    command = [sys.executable, "-m", "flows.cli", *words]
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_stopping_the_flow_kills_the_running_stage(project: Path, prefect_server: str, mlflow_file: str) -> None:
    program = "import os, time; open('pid.txt', 'w').write(str(os.getpid())); time.sleep(300)"
    (project / "slow.py").write_text(program)
    edit_stage(project, "python -c \"open('middle.txt', 'w')", "python slow.py; python -c \"open('middle.txt', 'w')")
    process = command_line(project, prefect_server, "run")
    pid = project / "pid.txt"
    deadline = time.monotonic() + 120
    while not (pid.is_file() and pid.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    stage = psutil.Process(int(pid.read_text()))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE
    assert newest_run(mlflow_file).info.status == "KILLED"


def test_the_command_line_answers_with_one_json_object(project: Path, prefect_server: str) -> None:
    process = command_line(project, prefect_server, "run", "--target", "first", "--json")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(output) == {"stages": {"first": "ran"}, "metrics": {}, "report": None}


@pytest.mark.parametrize("words", [("run",), ("run", "--target", "decoder")])
def test_the_command_line_explains_wrong_settings_without_a_traceback(
    project: Path, prefect_server: str, words: tuple[str, ...]
) -> None:
    if len(words) == 1:
        (project / "params.yaml").write_text("distil: {}\n")
    process = command_line(project, prefect_server, *words)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert ("unknown key 'distil'" if len(words) == 1 else "one of the stages first, middle, last") in errors
    assert "Traceback" not in errors


def test_progress_bars_are_told_from_lines() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"one\r\n 10%\r 20%\rdone\n\x1b[31mred\x1b[0m\nno end")
    os.close(writing)
    lines = list(read_lines(reading))
    os.close(reading)
    assert lines == [("one", False), (" 10%", True), (" 20%", True), ("done", False), ("red", False), ("no end", False)]


def test_a_process_and_its_descendants_are_ended_but_not_the_next_owner_of_its_id() -> None:
    program = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "
    program += "print('ready', flush=True); time.sleep(300)"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        leader = psutil.Process(child.pid)
        (descendant,) = leader.children()
        assert services.end_tree(child.pid, leader.create_time() - 100) == 0
        assert descendant.is_running()
        assert services.end_tree(child.pid, leader.create_time()) == 2
        assert not descendant.is_running() or descendant.status() == psutil.STATUS_ZOMBIE


def test_services_that_were_never_started_are_stopped_in_peace(tmp_path: Path) -> None:
    said: list[str] = []
    services.down(tmp_path, said.append)
    assert said == []
    with pytest.raises(FileNotFoundError, match="project's root"):
        services.up(tmp_path, 4200, 5000, said.append)
