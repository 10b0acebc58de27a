"""A tracking store of its own for tests of tasks, and a server that is not there."""

from pathlib import Path

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sqlite file for the module: creating its tables takes MLflow ten seconds."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture
def store(database: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The default store of a project in a temporary folder."""
    monkeypatch.chdir(database)
    for name in ("MLFLOW_TRACKING_URI", "VDMINI_PARENT_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return MlflowClient(tracking_uri=f"sqlite:///{database}/mlflow.db")


@pytest.fixture
def dead_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
