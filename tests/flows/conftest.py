"""One Prefect test server for the session, and a tiny project that the flow can run."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.flows.clones import Clones

# Before Prefect is imported, which creates its home at once.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="vdmini-prefect-")

DVC = """
stages:
  last:
    cmd: python -c "open('last.txt', 'w').write(open('middle.txt').read() + ' last')"
    deps: [middle.txt]
    outs: [last.txt]
  middle:
    cmd: python -c "open('middle.txt', 'w').write(open('first.txt').read() + ' middle')"
    deps: [first.txt]
    outs: [middle.txt]
  first:
    cmd: python -c "open('first.txt', 'w').write('first ' + open('source.txt').read())"
    deps: [source.txt]
    outs: [first.txt]
"""


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The address of a temporary Prefect server, which flows in this process use."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def mlflow_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite file for all flows of the session: creating its tables takes MLflow ten seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clones that each test has a copy of."""
    from tests.flows.clones import write_clones

    folder = tmp_path_factory.mktemp("clones")
    write_clones(folder)
    return folder


@pytest.fixture
def clones(template: Path, tmp_path: Path) -> "Clones":
    from tests.flows.clones import Clones

    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return Clones(tmp_path / "driver", (tmp_path / "first", tmp_path / "second"), tmp_path / "store")


@pytest.fixture
def project(tmp_path: Path, prefect_server: str, mlflow_file: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC project of three stages, listed against their order; the working directory."""
    (tmp_path / "dvc.yaml").write_text(DVC)
    (tmp_path / "source.txt").write_text("source")
    (tmp_path / "params.yaml").write_text("distill: {loop: {max_steps: 1, batch_size: 1}}\n")
    for command in (
        ["git", "init", "--quiet"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        [sys.executable, "-m", "dvc", "config", "core.analytics", "false"],
        ["git", "add", "--all"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "start"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_file)
    return tmp_path
