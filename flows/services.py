"""Prefect server, worker and MLflow server on this machine: started, recorded, and stopped completely.

Everything they keep lies in the project: records, logs and Prefect's database in .scratch/, runs in
mlflow.db and mlartifacts/. Each service leads a session of its own, by which `down` finds all of it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from vdmini_core.artifacts import write_json

HOST = "127.0.0.1"
POOL, WORKER = "vdmini-local", "vdmini-local-worker"
SERVICES = ("mlflow", "prefect", "worker")  # stopped in reverse: the worker still reports to the server
START_PATIENCE_S = 180.0  # a first start migrates two databases; 20 s on an idle machine
STOP_GRACE_S = 20.0  # Prefect kills a cancelled flow after 30 s: its child must be gone by then

Say = Callable[[str], None]


def record_path(root: Path, name: str) -> Path:
    """Where a service's process id and address are written; its log lies beside it."""
    return root / ".scratch" / "services" / f"{name}.json"


def _profile(root: Path) -> Path:
    """Where prefect.toml tells a plain `prefect` command to look for the server's address."""
    return root / ".scratch" / "prefect" / "profiles.toml"


def running(root: Path, name: str) -> dict[str, Any] | None:
    """The record of a service that is alive, or None; a reused process id does not count."""
    path = record_path(root, name)
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if _is_alive(record["pid"], record["created"]) else None


def environment(root: Path) -> dict[str, str]:
    """What a process of this project needs: Prefect's home, and the addresses of running services.

    Without a running server Prefect is told to start its own temporary one. Makes the home: Prefect
    creates the last folder of the path only.
    """
    home = root / ".scratch" / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    values = {"PREFECT_HOME": str(home), "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false"}
    if record := running(root, "prefect"):
        values["PREFECT_API_URL"] = record["url"]
    else:
        values["PREFECT_PROFILE"] = "ephemeral"
    if record := running(root, "mlflow"):
        values["MLFLOW_TRACKING_URI"] = record["url"]
    return values


def up(root: Path, prefect_port: int, mlflow_port: int, say: Say) -> None:
    """Start what is not running, wait until it answers, deploy prefect.yaml; all or nothing.

    Raises FileNotFoundError outside a project, RuntimeError for a port in use or a failed start
    (with the end of the service's log).
    """
    if not (root / "prefect.yaml").is_file():
        raise FileNotFoundError(f"{root / 'prefect.yaml'} does not exist; run vdmini from the project's root")
    started: list[str] = []
    try:
        _up(root, {"mlflow": mlflow_port, "prefect": prefect_port}, say, started)
    except BaseException:
        for name in reversed(started):
            _stop(root, name)
        raise


def _up(root: Path, ports: dict[str, int], say: Say, started: list[str]) -> None:
    for name, port in ports.items():
        record = running(root, name)
        if record is not None and record["port"] != port:
            raise RuntimeError(
                f"{name} of this project already runs on port {record['port']}, and {port} was asked for; "
                f"keep it with --{name}-port {record['port']}, or run `vdmini down` first"
            )
        if record is None:
            _require_free(name, port)
    python = [sys.executable, "-m"]
    store = ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}"]
    files = ["--no-serve-artifacts", "--default-artifact-root", str(root / "mlartifacts")]
    commands = {
        "mlflow": [*python, "mlflow", "server", "--host", HOST, "--workers", "1", *store, *files],
        "prefect": [*python, "prefect", "server", "start", "--host", HOST],
    }
    urls = {"mlflow": f"http://{HOST}:{ports['mlflow']}", "prefect": f"http://{HOST}:{ports['prefect']}/api"}
    for name, command in commands.items():
        if running(root, name) is None:
            _start(root, name, [*command, "--port", str(ports[name])], ports[name], urls[name])
            started.append(name)
    for name in commands:
        _wait(root, name, partial(_answers, f"{urls[name]}/health"))
        note = "" if name in started else " (was already running)"
        say(f"{name:8}{urls[name].removesuffix('/api')}{note}")
    _deploy(root, urls["prefect"])
    if running(root, "worker") is None:
        command = [*python, "prefect", "worker", "start", "--pool", POOL, "--name", WORKER, "--type", "process"]
        _start(root, "worker", [*command, "--install-policy", "never"], None, urls["prefect"])
        started.append("worker")
    _wait(root, "worker", lambda: _worker_is_online(urls["prefect"]))
    say(f"{'worker':8}polls work pool {POOL}{'' if 'worker' in started else ' (was already running)'}")


def down(root: Path, say: Say) -> None:
    """Stop every recorded service with all its processes; does nothing where nothing runs.

    A flow in progress is told first, while the servers still listen: it stops its stage and ends its
    runs truthfully. A worker that is told first would kill the flow instead.
    """
    if worker := running(root, "worker"):
        flows = psutil.Process(worker["pid"]).children()
        for process in flows:
            _send(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_S + 10
        while any(_lives(process) for process in flows) and time.monotonic() < deadline:
            time.sleep(0.1)
    for name in reversed(SERVICES):
        count = _stop(root, name)
        if count:
            say(f"{name:8}stopped ({count} process{'es' if count > 1 else ''})")


def end_tree(pid: int, created: float, grace_s: float = STOP_GRACE_S) -> int:
    """End a session leader and all it started: SIGTERM, then SIGKILL; how many there were.

    `created` guards against a process id that now belongs to somebody else. Descendants in sessions
    of their own are found while their parents live, the leader's session even after its death.
    """
    known: set[psutil.Process] = set()
    asked: set[psutil.Process] = set()
    try:
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            known |= _members(pid, created)
            alive = {process for process in known if _lives(process)}
            if not alive:
                return len(known)
            for process in alive - asked:
                _send(process, signal.SIGTERM)
            asked |= alive
            time.sleep(0.1)
    finally:  # also when a second Ctrl-C ends the waiting
        known |= _members(pid, created)
        for process in known:
            _send(process, signal.SIGKILL)
    psutil.wait_procs([process for process in known if _lives(process)], timeout=5)
    return len(known)


def _members(pid: int, created: float) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    if psutil.pid_exists(pid) and not _is_same(pid, created):
        return found  # the id was reused, so the recorded session is long gone
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == pid:
                found |= {process, *process.children(recursive=True)}
        except (psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            continue
    return {process for process in found if _lives(process)}


def _is_same(pid: int, created: float) -> bool:
    try:
        return bool(abs(psutil.Process(pid).create_time() - created) < 0.01)
    except psutil.NoSuchProcess:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _is_alive(pid: int, created: float) -> bool:
    return _is_same(pid, created) and _lives(psutil.Process(pid))


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        process.send_signal(number)


def _require_free(name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise RuntimeError(
                f"expected port {port} to be free for the {name} server, but another program listens on it; "
                f"stop it (`vdmini down` if it is a leftover of this project), or choose another --{name}-port"
            ) from None


def _start(root: Path, name: str, command: list[str], port: int | None, url: str) -> None:
    path = record_path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {**os.environ, **environment(root), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", "")])
    values["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven idle processes for features unused here
    if name == "prefect":
        values["PREFECT_API_URL"] = url
    with path.with_suffix(".log").open("w") as log:
        child = subprocess.Popen(
            command, cwd=root, env=values, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    record = {"pid": child.pid, "created": psutil.Process(child.pid).create_time(), "port": port, "url": url}
    write_json(path, record)


def _stop(root: Path, name: str) -> int:
    path = record_path(root, name)
    if not path.is_file():
        return 0
    record = json.loads(path.read_text())
    count = end_tree(record["pid"], record["created"])
    path.unlink()
    if name == "prefect":
        _profile(root).unlink(missing_ok=True)
    return count


def _wait(root: Path, name: str, is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_PATIENCE_S
    while not is_ready():
        dead = running(root, name) is None
        if dead or time.monotonic() > deadline:
            log = record_path(root, name).with_suffix(".log")
            what = "ended while starting" if dead else f"did not answer within {START_PATIENCE_S:.0f} s"
            raise RuntimeError(f"{name} {what}; the end of {log}:\n{_tail(log.read_text(errors='replace'))}")
        time.sleep(0.5)


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-15:])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def _worker_is_online(api: str) -> bool:
    workers = _post(f"{api}/work_pools/{POOL}/workers/filter", {})
    return any(worker["name"] == WORKER and worker["status"] == "ONLINE" for worker in workers)


def _deploy(root: Path, api: str) -> None:
    """Deploy prefect.yaml, and let a plain `prefect` find the server."""
    _profile(root).write_text(f'active = "vdmini"\n\n[profiles.vdmini]\nPREFECT_API_URL = "{api}"\n')
    command = [sys.executable, "-m", "flows.deployment"]
    values = {**os.environ, **environment(root), "PREFECT_API_URL": api}
    done = subprocess.run(command, cwd=root, env=values, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(_tail(done.stdout + done.stderr))
