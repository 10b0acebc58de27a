"""MLflow lives here and nowhere else: runs whose metrics outlive a dead server, and the registry.

What a stage reports is on disk before MLflow hears of it. A background thread uploads in batches; a
server that died and came back gets everything, one that stays dead costs a stage some seconds at its
end and one warning line, which says how to send the rest later; never its result.
"""

import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

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

from tasks._journal import Journal, Row

Status = Literal["FINISHED", "FAILED", "KILLED"]
T = TypeVar("T")

EXPERIMENT = "vdmini"
PARENT_VARIABLE = "VDMINI_PARENT_RUN_ID"
UPLOAD_EVERY_S = 3.0
RETRY_EVERY_S, RETRY_FOR_S = 1.0, 20.0  # at the end of a stage; a server starts in 5 to 15 s
MAX_METRICS, MAX_PARAMS, MAX_VALUE = 1000, 100, 6000  # MLflow's limits: per batch, per batch, characters
MAX_ROWS = 500  # of a journal, in memory at once
SENT = "metrics.jsonl"

logger = logging.getLogger("vdmini.tracking")


def project_root() -> Path:
    """The project's folder: the working directory, or, in a DVC queue's copy of it, the original."""
    here = Path.cwd()
    return next((path.parent for path in here.parents if path.name == ".dvc"), here)


def tracking_uri() -> str:
    """Where runs go: MLFLOW_TRACKING_URI, else the project's own sqlite file.

    Addresses appear in messages, so a password in one moves to the variables that MLflow reads.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"
    parts = urlsplit(uri)
    if uri.startswith("http") and parts.password is not None:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
        uri = os.environ["MLFLOW_TRACKING_URI"] = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return uri


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


class Upload:
    """Sends a journal to MLflow, each row at least once: of a metric sent again MLflow keeps one."""

    def __init__(self, journal: Journal, uri: str) -> None:
        self.journal, self._uri = journal, uri
        known = [row["run_id"] for row in journal.read()[0] if "run_id" in row]
        self.run_id: str | None = known[-1] if known else None
        self.beat = time.monotonic()  # when the server last took something
        self._client: MlflowClient | None = None
        self._offset = 0
        self._left: list[Row] = []  # what is no metric and was not taken yet

    def send(self, end: Row | None = None) -> None:
        """Send what the server does not have yet; raise the last problem after everything was tried.

        `end`, a row of status and time, ends the run, even if something else was refused.
        """
        try:
            self._send_rows()
        finally:
            if end is not None and self._client is not None and self.run_id is not None:
                self._client.set_terminated(self.run_id, end["status"], end["time_ms"])

    def _send_rows(self) -> None:
        client = self._client = self._client or connect(self._uri)
        run_id = self._begin(client)
        while True:
            rows, after = self.journal.read(self._offset, MAX_ROWS)
            metrics = [
                Metric(name, float(value), row["time_ms"], row["step"])
                for row in rows
                for name, value in row.get("metrics", {}).items()
            ]
            for batch in _batches(metrics, MAX_METRICS):
                client.log_batch(run_id, metrics=batch)
                self.beat = time.monotonic()
            self._left += [row for row in rows if "metrics" not in row]
            if after == self._offset:
                break
            self._offset = after
        left, self._left, problem = self._left, list[Row](), None
        for row in left:
            try:
                _send_row(client, run_id, row)
                self.beat = time.monotonic()
            except Exception as error:
                self._left.append(row)
                problem = error
        if problem is not None:
            raise problem

    def _begin(self, client: MlflowClient) -> str:
        if self.run_id is None:
            run = self.journal.read(most=1)[0][0]["run"]
            self.run_id = _create_run(client, self._uri, run["name"], run["started_ms"], run["tags"])
            self.beat = time.monotonic()
            self.journal.append({"run_id": self.run_id})
        return self.run_id


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _send_row(client: MlflowClient, run_id: str, row: Row) -> None:
    match row:
        case {"params": params}:
            for batch in _batches([Param(key, value) for key, value in params.items()], MAX_PARAMS):
                client.log_batch(run_id, params=batch)
        case {"tags": tags}:
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        case {"artifact": path, "folder": folder}:
            if not Path(path).exists():  # a journal may be sent long after its run
                logger.warning("%s is gone and was not sent to MLflow", path)
                return
            send = client.log_artifacts if Path(path).is_dir() else client.log_artifact
            send(run_id, path, folder or None)


class Tracker:
    """One stage's run; made by `open_tracker`. Its methods never raise or wait because of MLflow.

    Everything goes into the journal `unsent-<milliseconds>.jsonl`, which a thread uploads in batches. Once
    MLflow has it all, the file becomes `metrics.jsonl`, in place of the run before.
    """

    def __init__(self, stage: str, params: dict[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        started_ms = int(time.time() * 1000)
        self._uri = tracking_uri()
        self._journal = Journal(folder / f"unsent-{started_ms}.jsonl")
        self._journal.hold()
        tags = {"vdmini.stage": stage}
        if parent := os.environ.get(PARENT_VARIABLE):
            tags["mlflow.parentRunId"] = parent
        self._journal.append({"run": {"name": stage, "started_ms": started_ms, "tags": tags}})
        self._journal.append({"params": flatten(params)})
        self._upload = Upload(self._journal, self._uri)
        self._error: BaseException | None = None
        self._end: Row | None = None
        self._retry_until = 0.0
        self._tried, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-upload", daemon=True)
        self._thread.start()
        self._tried.wait(_patience_s(self._uri))

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, or None while no server has answered."""
        return self._upload.run_id

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append one row to the journal; values that are not finite become "nan" or "inf", as JSON has none."""
        values = {name: float(value) for name, value in metrics.items()}
        plain = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._journal.append({"step": step, "time_ms": int(time.time() * 1000), "metrics": plain})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Queue the upload of a file, or of a folder's files; it must stay in place until the run closes."""
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; write the file before tracker.artifact()")
        self._journal.append({"artifact": str(path.resolve()), "folder": folder})

    def tags(self, values: dict[str, str]) -> None:
        """Queue tags of the run."""
        self._journal.append({"tags": {key: str(value) for key, value in values.items()}})

    def close(self, status: Status) -> None:
        """Upload the rest and end the run, or warn where the rest is and how to send it.

        A server that this run has seen alive is given RETRY_FOR_S to come back, unless the stage failed
        or was told to stop; any other wait ends after a few seconds without progress.
        """
        self._end = {"status": status, "time_ms": int(time.time() * 1000)}
        with suppress(OSError):  # a full disk may be why the stage ends
            self._journal.append(self._end)
        patient = status == "FINISHED" and self.run_id is not None
        self._retry_until = time.monotonic() + (RETRY_FOR_S if patient else 0.0)
        self._closing.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
            if time.monotonic() - max(self._retry_until, self._upload.beat) > _patience_s(self._uri):
                break
        file = self._journal.file
        if self._thread.is_alive() or self._error is not None:
            _warn(self._uri, self._error, f"every metric is in {file}; to send it later: vdmini upload {file}")
        else:
            with suppress(OSError):
                file.replace(file.with_name(SENT))
        self._journal.release()

    def _work(self) -> None:
        """The upload thread: at once, every few seconds, and at close until everything is sent or time is up."""
        while True:
            closing, self._error = self._closing.is_set(), None
            try:
                self._upload.send(self._end if closing else None)
            except Exception as error:  # a tracking outage must not stop training
                self._error = error
            self._tried.set()
            if closing and (self._error is None or time.monotonic() >= self._retry_until):
                break
            self._closing.wait(UPLOAD_EVERY_S) if not closing else time.sleep(RETRY_EVERY_S)


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

    `folder` receives the journal of metrics. The run ends FINISHED, FAILED (an exception) or KILLED (SIGTERM,
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


def upload_journal(file: Path) -> str:
    """Send the journal of a run that has ended, once MLflow takes it again; returns the run's id.

    A run that was killed before it could say how it ended becomes KILLED. Raises ValueError for
    another file, ConnectionError if MLflow does not take everything; then the same call may be repeated.
    """
    uri, journal = tracking_uri(), Journal(file)
    rows, _ = journal.read()
    if not rows or "run" not in rows[0]:
        raise ValueError(f"{file} is not the journal of a run; expected an unsent-*.jsonl of .scratch/tracking")
    last_ms = max([row["time_ms"] for row in rows if "time_ms" in row], default=rows[0]["run"]["started_ms"])
    end = next((row for row in rows if "status" in row), {"status": "KILLED", "time_ms": last_ms})
    try:
        journal.hold()
    except BlockingIOError:
        raise ValueError(
            f"{file} belongs to a stage that is still running and sends it itself; wait for its end"
        ) from None
    upload = Upload(journal, uri)
    try:
        upload.send(end)
        file.replace(file.with_name(SENT))
    except Exception as error:
        raise ConnectionError(
            f"MLflow at {uri} did not take everything: {' '.join(str(error).split())[:300]}; start it with "
            "`vdmini up`, or unset MLFLOW_TRACKING_URI to use the project's mlflow.db, and repeat"
        ) from error
    finally:
        journal.release()
    assert upload.run_id is not None
    return upload.run_id


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
