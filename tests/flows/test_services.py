"""The servers of one machine, started for real: who can reach them, and what a run on them leaves behind."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from flows import services
from tests import planted

ROOT = Path(__file__).parents[2]
PREFECT = """
name: quick
deployments:
  - name: full
    entrypoint: flows/full.py:vdmini
    parameters: {target: null}
    work_pool: {name: vdmini-local}
"""
DVC = """
stages:
  first:
    cmd: echo made > first.txt
    outs: [first.txt]
  last:
    cmd: python -c "import os; print(len(os.environ['HF_TOKEN'])); raise OSError('the reason')"
    deps: [first.txt]
    outs: [last.txt]
"""
REMOTE = f"""
['remote "s3"']
    url = s3://bucket/vdmini
    access_key_id = {planted.SECRETS["AWS_ACCESS_KEY_ID"]}
    secret_access_key = {planted.SECRETS["AWS_SECRET_ACCESS_KEY"]}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A git and DVC project whose second stage fails, with secrets in its environment; its services are stopped."""
    files = {
        "prefect.yaml": PREFECT,
        "prefect.toml": (ROOT / "prefect.toml").read_text(),
        "dvc.yaml": DVC,
        "params.yaml": "distill: {loop: {max_steps: 1, batch_size: 1}}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "flows").symlink_to(ROOT / "flows")
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / ".dvc/config.local").write_text(REMOTE)
    monkeypatch.chdir(tmp_path)
    for name in ("PREFECT_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PYTHONPATH": str(ROOT), **planted.SECRETS}.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    services.down(tmp_path, lambda line: None)


def free_ports() -> tuple[int, int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        first, second = (each.getsockname()[1] for each in sockets)
    return first, second


def listening(root: Path) -> set[tuple[str, int]]:
    """Addresses at which the recorded services and all they started accept connections."""
    found = set()
    for name in services.SERVICES:
        record = services.running(root, name)
        assert record is not None
        leader = psutil.Process(record["pid"])
        for process in [leader, *leader.children(recursive=True)]:
            connections = process.net_connections(kind="inet")
            found |= {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
def test_the_servers_of_one_machine_listen_on_loopback_and_keep_no_secret(project: Path) -> None:
    prefect_port, mlflow_port = free_ports()
    services.up(project, prefect_port, mlflow_port, lambda line: None)
    addresses = listening(project)
    assert {port for _, port in addresses} >= {prefect_port, mlflow_port}
    assert {address for address, _ in addresses} == {"127.0.0.1"}
    command = [sys.executable, "-m", "prefect", "deployment", "run", "vdmini/full", "--watch"]
    environment = {**os.environ, **services.environment(project)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
    log = (project / ".scratch/services/worker.log").read_text()
    assert "OSError: the reason" in log, done.stdout + done.stderr
    services.down(project, lambda line: None)
    assert listening_nowhere(prefect_port)
    assert listening_nowhere(mlflow_port)
    assert (project / ".scratch/prefect/prefect.db").stat().st_size > 100_000
    assert planted.files_with_secrets(project, meant=[".dvc/config.local"]) == []
    assert not any(secret in done.stdout + done.stderr for secret in planted.SECRETS.values())


def listening_nowhere(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
