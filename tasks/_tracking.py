"""MLflow lives here and nowhere else: runs whose metrics outlive a dead server, and the registry.

What a stage reports is on disk before MLflow hears of it. A background thread uploads in batches;
a dead server costs a stage a few seconds and one warning line, never its result.
"""

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

# Read by MLflow: nothing leaves the machine, and a request to a dead server ends within seconds,
# not after MLflow's several minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for results
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException as MlflowException

Status = Literal["FINISHED", "FAILED", "KILLED"]
Call = Callable[[MlflowClient, str], Any]  # what to send, given the client and the run's id
T = TypeVar("T")

EXPERIMENT = "vdmini"
PARENT_VARIABLE = "VDMINI_PARENT_RUN_ID"
UPLOAD_EVERY_S = 3.0
MAX_METRICS, MAX_PARAMS, MAX_VALUE = 1000, 100, 6000  # MLflow's limits: per batch, per batch, characters

logger = logging.getLogger("vdmini.tracking")


def project_root() -> Path:
    """The project's folder: the working directory, or, in a DVC queue's copy of it, the original."""
    here = Path.cwd()
    return next((path.parent for path in here.parents if path.name == ".dvc"), here)


def tracking_uri() -> str:
    """Where runs go: MLFLOW_TRACKING_URI, else the project's own sqlite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def _patience_s(uri: str) -> float:
    """Seconds without progress after which a store counts as dead; a new sqlite file needs 10 or more."""
    return 5.0 if uri.startswith("http") else 60.0


def connect(uri: str) -> MlflowClient:
    """A client of one server for runs and registry alike; contacts nobody yet."""
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _warn(uri: str, error: BaseException | None, consequence: str) -> None:
    reason = " ".join(str(error).split())[:200] if error else "no answer in time"
    logger.warning("MLflow at %s did not take everything (%s); %s", uri, reason, consequence)


def _experiment_id(client: MlflowClient, uri: str) -> str:
    """The experiment's id, created at first use; a server chooses the artifact root itself."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        location = None if uri.startswith("http") else str(project_root() / "mlartifacts")
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=location))
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return str(found.experiment_id)


def _create_run(client: MlflowClient, uri: str, name: str, started_ms: int, tags: dict[str, str]) -> str:
    experiment = _experiment_id(client, uri)
    return str(client.create_run(experiment, start_time=started_ms, tags=tags, run_name=name).info.run_id)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and texts, cut at MLflow's limit."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value) if isinstance(value, list | tuple) else str(value)
            flat[f"{prefix}{key}"] = text[:MAX_VALUE]
    return flat


def _status(error: BaseException) -> Status:
    """KILLED when somebody asked the stage to stop, FAILED when it went wrong."""
    loop = sys.modules.get("vdmini_core.training.loop")  # loaded only if this stage trains
    if loop is not None and isinstance(error, loop.Interrupted):
        return "KILLED"
    if isinstance(error, SystemExit):
        killed = isinstance(error.code, int) and error.code >= 128
        return "KILLED" if killed else "FINISHED" if not error.code else "FAILED"
    return "FAILED" if isinstance(error, Exception) else "KILLED"


class Tracker:
    """One stage's run; made by `open_tracker`. Its methods never raise because of MLflow."""

    def __init__(self, stage: str, params: dict[str, Any], folder: Path) -> None:
        self._uri = tracking_uri()
        self._stage, self._path = stage, folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._started_ms = int(time.time() * 1000)
        self._lock = threading.Lock()
        self._metrics: list[Metric] = []
        self._calls: deque[Call] = deque()
        self._run_id: str | None = None
        self._status: Status | None = None
        self._error: BaseException | None = None
        self._beat = time.monotonic()
        self._tried, self._closing = threading.Event(), threading.Event()
        rows = [Param(key, value) for key, value in flatten(params).items()]
        for start in range(0, len(rows), MAX_PARAMS):
            part = rows[start : start + MAX_PARAMS]
            self._calls.append(partial(MlflowClient.log_batch, params=part))
        self._thread = threading.Thread(target=self._work, name="mlflow-upload", daemon=True)
        self._thread.start()
        self._tried.wait(_patience_s(self._uri))

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, or None while no server has answered."""
        return self._run_id

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one line to metrics.jsonl, now; queue the same numbers for MLflow.

        Values that are not finite become null on disk, which JSON can hold.
        """
        values, now = {name: float(value) for name, value in metrics.items()}, time.time()
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._path.open("a") as stream:
            stream.write(json.dumps({"step": step, "time": round(now, 3), **finite}) + "\n")
        with self._lock:
            self._metrics += [Metric(name, value, int(now * 1000), step) for name, value in values.items()]

    def artifact(self, path: Path, folder: str = "") -> None:
        """Queue the upload of a file, or of a folder's files; it must stay in place until the run closes."""
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; write the file before tracker.artifact()")
        send = MlflowClient.log_artifacts if path.is_dir() else MlflowClient.log_artifact
        self._calls.append(lambda client, run_id: send(client, run_id, str(path.resolve()), folder or None))

    def tags(self, values: dict[str, str]) -> None:
        """Queue tags of the run."""
        self._calls.append(partial(MlflowClient.log_batch, tags=[RunTag(k, str(v)) for k, v in values.items()]))

    def close(self, status: Status) -> None:
        """Upload the rest and end the run; give up after a few seconds without progress."""
        self._status, closed = status, time.monotonic()
        self._closing.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
            if time.monotonic() - max(closed, self._beat) > _patience_s(self._uri):
                break
        if self._thread.is_alive() or self._error is not None:
            _warn(self._uri, self._error, f"run {self._run_id or '(none)'}; every metric is in {self._path}")

    def _work(self) -> None:
        """The upload thread: at once, then every few seconds, and a last time at close."""
        client: MlflowClient | None = None
        last = False
        while True:
            self._error = None
            try:
                client = client or connect(self._uri)
                self._upload(client, last)
            except Exception as error:  # a tracking outage must not stop training
                self._error = error
            self._tried.set()
            if last:
                return
            last = self._closing.wait(UPLOAD_EVERY_S)

    def _upload(self, client: MlflowClient, last: bool) -> None:
        """Send everything queued; keep what fails for the next time and raise its error at the end."""
        if self._run_id is None:
            tags = {"vdmini.stage": self._stage}
            if parent := os.environ.get(PARENT_VARIABLE):
                tags["mlflow.parentRunId"] = parent
            self._run_id = _create_run(client, self._uri, self._stage, self._started_ms, tags)
            self._tried.set()
        run_id, failed, error = self._run_id, list[Call](), None
        while self._calls:
            call = self._calls.popleft()
            try:
                call(client, run_id)
                self._beat = time.monotonic()
            except Exception as problem:
                failed.append(call)
                error = problem
        self._calls.extendleft(reversed(failed))
        try:
            while batch := self._metrics[:MAX_METRICS]:
                client.log_batch(run_id, metrics=batch)
                self._beat = time.monotonic()
                with self._lock:
                    del self._metrics[: len(batch)]
        finally:
            if last:
                client.set_terminated(run_id, self._status)
        if error is not None:
            raise error


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143), once, unless the program handles it or this is a thread."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # the run is being closed: do not interrupt that
        raise SystemExit(128 + number)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def open_tracker(stage: str, params: dict[str, Any], folder: Path) -> Iterator[Tracker]:
    """Track one stage: a run named after it, a child of the run in VDMINI_PARENT_RUN_ID if set.

    `folder` receives metrics.jsonl. The run ends FINISHED, FAILED (an exception) or KILLED (SIGTERM,
    Ctrl-C, or `Interrupted` from the training loop).
    """
    os.environ.pop("MLFLOW_RUN_ID", None)  # it would silently make this run be another one
    with _sigterm_raises():
        tracker = Tracker(stage, params, folder)
        try:
            yield tracker
        except BaseException as error:
            tracker.close(_status(error))
            raise
        tracker.close("FINISHED")


def _attempt(action: Callable[[MlflowClient, str], T], consequence: str) -> T | None:
    """Do something with the server in a thread of its own; None and one warning if that fails or stalls."""
    uri, result, errors = tracking_uri(), list[T](), list[BaseException]()

    def work() -> None:
        try:
            result.append(action(connect(uri), uri))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="mlflow-call", daemon=True)
    thread.start()
    thread.join(_patience_s(uri))
    if not result:
        _warn(uri, errors[0] if errors else None, consequence)
        return None
    return result[0]


def start_parent(name: str) -> str | None:
    """Open the run of a whole recipe and return its id; None if no server answers."""
    now = int(time.time() * 1000)
    return _attempt(lambda client, uri: _create_run(client, uri, name, now, {}), "stages run without a parent run")


def finish_parent(run_id: str | None, status: Status, tags: dict[str, str], metrics: dict[str, float]) -> None:
    """End the recipe's run; children that a hard kill left RUNNING are ended as KILLED."""

    def action(client: MlflowClient, uri: str) -> bool:
        assert run_id is not None
        now = int(time.time() * 1000)
        rows = [Metric(name, float(value), now, 0) for name, value in metrics.items()]
        client.log_batch(run_id, metrics=rows, tags=[RunTag(key, str(value)) for key, value in tags.items()])
        left = f"tags.mlflow.parentRunId = '{run_id}' and attributes.status = 'RUNNING'"
        for child in client.search_runs([_experiment_id(client, uri)], filter_string=left):
            client.set_terminated(child.info.run_id, "KILLED")
        client.set_terminated(run_id, status)
        return True

    if run_id is not None:
        _attempt(action, f"parent run {run_id} is incomplete")
