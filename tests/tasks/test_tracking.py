"""Runs and dead servers, against a real sqlite file and a real server on top of it."""

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks import _tracking
from tasks._tracking import Tracker, finish_parent, flatten, open_tracker, start_parent, upload_journal

ROOT = Path(__file__).parents[2]


def journal(folder: Path) -> Path:
    """The only journal in a tracking folder."""
    (file,) = folder.glob("*.jsonl")
    return file


def journal_names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.jsonl")}


def rows(folder: Path) -> list[dict]:
    """What was logged, according to the only journal."""
    found = [json.loads(line) for line in journal(folder).read_text().splitlines()]
    return [row for row in found if "metrics" in row]


def history(store: MlflowClient, run_id: str | None, name: str) -> list[tuple[int, float]]:
    assert run_id is not None
    return sorted((metric.step, metric.value) for metric in store.get_metric_history(run_id, name))


class Server:
    """`mlflow server` over the module's sqlite file, in a process group of its own."""

    def __init__(self, database: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._database = database
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return at once; it answers some seconds later."""
        folder = self._database
        store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", f"{folder}/files"]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--no-serve-artifacts", *store]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
            )

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                return True
        except OSError:
            return False

    def wait(self) -> None:
        deadline = time.monotonic() + 180
        while not self.answers():
            assert time.monotonic() < deadline, (self._database / "server.log").read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the server and its worker."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(store: MlflowClient, database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A real server that answers; `store` reads the same sqlite file without it."""
    store.search_experiments()  # the tables exist before two processes want them
    server = Server(database)
    server.start()
    try:
        server.wait()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        yield server
    finally:
        server.kill()


def train(tracker: Tracker, steps: Iterator[int], until: Callable[[], bool]) -> float:
    """Log 3 metrics every 5 ms, at least 100 steps and until `until`; the longest pause in seconds."""
    longest, checked = 0.0, time.monotonic()
    for count, step in enumerate(steps):
        started = time.monotonic()
        tracker.log({"train/student/total": 1 / (step + 1), "train/student/task": step, "constant": 1.0}, step)
        longest = max(longest, time.monotonic() - started)
        time.sleep(0.005)
        if count >= 100 and time.monotonic() - checked > 0.5:
            checked = time.monotonic()
            if until():
                return longest
    raise AssertionError("steps ended")


def test_a_run_holds_settings_metrics_tags_and_files(store: MlflowClient, database: Path, tmp_path: Path) -> None:
    (tmp_path / "plot.txt").write_text("a plot")
    with open_tracker("distill", {"loop": {"max_steps": 7}, "betas": (0.9, 0.99)}, tmp_path) as tracker:
        for step in range(1500):
            tracker.log({"loss/task": 1.0 / (step + 1)}, step)
        tracker.artifact(tmp_path / "plot.txt", "plots")
        tracker.tags({"digest": "abc"})
    assert tracker.run_id is not None
    run = store.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"loop.max_steps": "7", "betas": "[0.9, 0.99]"}
    assert run.data.tags["digest"] == "abc"
    assert run.data.tags["vdmini.stage"] == "distill"
    assert len(store.get_metric_history(tracker.run_id, "loss/task")) == 1500
    assert (database / "mlartifacts" / tracker.run_id / "artifacts/plots/plot.txt").read_text() == "a plot"


def test_metrics_are_on_disk_before_the_next_line_of_the_stage_runs(store: MlflowClient, tmp_path: Path) -> None:
    with open_tracker("teacher", {}, tmp_path) as tracker:
        tracker.log({"quality/content": 0.5, "loss": float("nan")}, 3)
        (row,) = rows(tmp_path)
    assert row["step"] == 3
    assert row["metrics"] == {"quality/content": 0.5, "loss": "nan"}
    assert tracker.run_id is not None
    (kept,) = store.get_metric_history(tracker.run_id, "loss")
    assert math.isnan(kept.value)


def test_only_the_last_of_the_journals_that_mlflow_has_is_kept(store: MlflowClient, tmp_path: Path) -> None:
    for step in range(2):
        with open_tracker("teacher", {}, tmp_path) as tracker:
            tracker.log({"loss": 1.0}, step)
            assert journal_names(tmp_path) - {"metrics.jsonl"} != set()
    assert journal(tmp_path).name == "metrics.jsonl"
    assert [row["step"] for row in rows(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(1), "FAILED"),
    ],
)
def test_a_run_ends_as_its_stage_did(store: MlflowClient, tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), open_tracker("prune", {}, tmp_path) as tracker:
        raise error
    assert tracker.run_id is not None
    assert store.get_run(tracker.run_id).info.status == status


def test_sigterm_closes_the_run_as_killed(store: MlflowClient, database: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tasks._tracking import open_tracker\n"
        "with open_tracker('distill', {}, Path(sys.argv[1])) as tracker:\n"
        "    print(tracker.run_id, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=database) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert store.get_run(run_id).info.status == "KILLED"


def test_a_stage_is_the_child_of_its_recipe(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = start_parent("full")
    assert parent is not None
    monkeypatch.setenv("VDMINI_PARENT_RUN_ID", parent)
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    with open_tracker("plan", {}, tmp_path) as tracker:
        pass
    assert "MLFLOW_RUN_ID" not in os.environ
    assert tracker.run_id is not None
    assert tracker.run_id != parent
    assert store.get_run(tracker.run_id).data.tags["mlflow.parentRunId"] == parent
    finish_parent(parent, "FAILED", {"stage.plan": "ran"}, {"size/parameters": 3.0})
    run = store.get_run(parent)
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"size/parameters": 3.0}
    assert run.data.tags["stage.plan"] == "ran"


def test_a_child_that_died_silently_is_killed_with_its_parent(store: MlflowClient) -> None:
    parent = start_parent("full")
    assert parent is not None
    experiment = store.get_run(parent).info.experiment_id
    child = store.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id
    finish_parent(parent, "KILLED", {}, {})
    assert store.get_run(child).info.status == store.get_run(parent).info.status == "KILLED"


def test_a_dead_server_costs_seconds_and_no_metric(
    dead_server: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    with open_tracker("distill", {"a": 1}, tmp_path) as tracker:
        for step in range(200):
            tracker.log({"loss": float(step)}, step)
        tracker.tags({"a": "b"})
    assert time.monotonic() - started < 10
    assert tracker.run_id is None
    assert [row["metrics"]["loss"] for row in rows(tmp_path)] == [float(step) for step in range(200)]
    (warning,) = [record for record in caplog.records if record.name == "vdmini.tracking"]
    assert "http://127.0.0.1:9" in warning.getMessage()
    assert f"vdmini upload {journal(tmp_path)}" in warning.getMessage()


def test_a_server_killed_and_restarted_has_every_metric_and_never_paused_the_caller(
    server: Server, store: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps, pauses = itertools.count(), list[float]()
    with open_tracker("distill", {"a": 1}, tmp_path) as tracker:
        pauses.append(train(tracker, steps, lambda: bool(history(store, tracker.run_id, "constant"))))
        server.kill()
        pauses.append(train(tracker, steps, lambda: tracker._error is not None))
        server.start()
        pauses.append(train(tracker, steps, server.answers))
        tracker.tags({"after": "the restart"})
    count = next(steps)
    print(
        f"{count} steps; the longest pauses alive, dead, restarting: {', '.join(f'{p * 1000:.1f} ms' for p in pauses)}"
    )
    assert max(pauses) < 5
    assert [step for step, _ in history(store, tracker.run_id, "constant")] == list(range(count))
    assert history(store, tracker.run_id, "train/student/task") == [(step, step) for step in range(count)]
    assert history(store, tracker.run_id, "train/student/total") == [(s, 1 / (s + 1)) for s in range(count)]
    run = store.get_run(str(tracker.run_id))
    assert (run.info.status, run.data.tags["after"]) == ("FINISHED", "the restart")
    assert [record for record in caplog.records if record.name == "vdmini.tracking"] == []
    assert journal(tmp_path).name == "metrics.jsonl"


def test_a_server_that_stays_dead_costs_a_warning_whose_command_sends_the_rest(
    server: Server,
    store: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_tracking, "RETRY_FOR_S", 2.0)
    (tmp_path / "plan.json").write_text("{}")
    with open_tracker("distill", {"a": 1}, tmp_path) as tracker:
        tracker.log({"loss": 1.0}, 0)
        server.kill()
        tracker.log({"loss": 0.5}, 1)
        tracker.artifact(tmp_path / "plan.json")
        closing = time.monotonic()
    assert time.monotonic() - closing < 12
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "vdmini.tracking"]
    assert store.get_run(str(tracker.run_id)).info.status == "RUNNING"
    file = Path(warning.rpartition("vdmini upload ")[2])
    with pytest.raises(ConnectionError, match="did not take everything"):
        upload_journal(file)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the project's own sqlite file is the server's here
    assert upload_journal(file) == tracker.run_id
    run = store.get_run(str(tracker.run_id))
    assert (run.info.status, run.data.params) == ("FINISHED", {"a": "1"})
    assert history(store, tracker.run_id, "loss") == [(0, 1.0), (1, 0.5)]
    assert [file.path for file in store.list_artifacts(str(tracker.run_id))] == ["plan.json"]
    assert journal_names(tmp_path) == {"metrics.jsonl"}


def test_a_server_that_accepts_and_never_answers_does_not_pause_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with open_tracker("distill", {}, tmp_path) as tracker:
            assert train(tracker, itertools.count(), lambda: True) < 1
        assert tracker.run_id is None


def test_the_journal_of_a_killed_stage_can_be_sent(store: MlflowClient, tmp_path: Path) -> None:
    file = tmp_path / "unsent-1.jsonl"
    lines = [
        {"run": {"name": "distill", "started_ms": 1000, "tags": {"vdmini.stage": "distill"}}},
        {"step": 0, "time_ms": 2000, "metrics": {"loss": 1.0}},
        {"step": 1, "time_ms": 3000, "metrics": {"loss": "inf"}},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "ti')
    run = store.get_run(upload_journal(file))
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("KILLED", 1000, 3000)
    assert [step for step, _ in history(store, run.info.run_id, "loss")] == [0, 1]


def test_the_journal_of_a_running_stage_is_left_to_it(store: MlflowClient, tmp_path: Path) -> None:
    with open_tracker("distill", {}, tmp_path) as tracker:
        tracker.log({"loss": 1.0}, 0)
        with pytest.raises(ValueError, match="still running"):
            upload_journal(journal(tmp_path))
        tracker.log({"loss": 2.0}, 1)
    assert history(store, tracker.run_id, "loss") == [(0, 1.0), (1, 2.0)]


def test_what_is_no_journal_is_refused(store: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl is not the journal of a run"):
        upload_journal(tmp_path / "other.jsonl")


def test_what_a_server_missed_is_uploaded_when_it_is_back(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([ConnectionError("down"), None])

    def connect(uri: str) -> MlflowClient:
        if error := next(answers):
            raise error
        return store

    monkeypatch.setattr(_tracking, "connect", connect)
    with open_tracker("distill", {"a": 1}, tmp_path) as tracker:
        assert tracker.run_id is None
        tracker.log({"loss": 2.0}, 0)
    assert tracker.run_id is not None
    run = store.get_run(tracker.run_id)
    assert run.data.metrics == {"loss": 2.0}
    assert run.data.params == {"a": "1"}
    assert run.info.status == "FINISHED"


def test_a_flow_runs_without_a_parent_when_the_server_is_dead(dead_server: None) -> None:
    assert start_parent("full") is None
    finish_parent(None, "FINISHED", {}, {})


def test_an_artifact_that_was_never_written_is_an_error(store: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="write the file before"), open_tracker("plan", {}, tmp_path) as tracker:
        tracker.artifact(tmp_path / "missing.png")


def test_settings_become_dotted_keys_cut_at_the_limit_of_mlflow() -> None:
    assert flatten({"a": {"b": {"c": None}}, "d": True}) == {"a.b.c": "None", "d": "True"}
    assert len(flatten({"a": "x" * 9000})["a"]) == 6000
