"""The servers of compose.yaml without containers: its commands and variables, with a real PostgreSQL and S3."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.services import end_tree
from tasks._registry import model_tags, register_model
from tasks._tracking import open_tracker
from tests.deploy.test_templates import SECRETS, compose, example
from tests.flows.conftest import DVC

ROOT = Path(__file__).parents[2]
VALUES = {name: f"{name.lower().replace('_', '')}71" for name in SECRETS} | {"PREFECT_AUTH_STRING": "vdmini:prefect71"}
PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), None) if shutil.which("runuser") else None
NEEDED = ("psycopg", "boto3", "flask_wtf", "moto", "asyncpg")


def missing() -> str:
    """What this machine lacks for the test, or nothing."""
    from importlib.util import find_spec

    found = [name for name in NEEDED if find_spec(name) is None]
    return ", ".join([*found, *([] if PROGRAMS and os.getuid() == 0 else ["Debian's postgresql, as root"])])


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}")]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, answers: Callable[[], bool], **environment: str) -> Iterator[None]:
    """A server, from its first answer to its end."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env={**os.environ, **environment},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    created = psutil.Process(process.pid).create_time()
    try:
        deadline = time.monotonic() + 240
        while not answers():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield
    finally:
        end_tree(process.pid, created)
        process.wait()


def status(url: str, account: str | None = None) -> int:
    """HTTP's status of an address; 0 without an answer."""
    headers = {} if account is None else {"Authorization": f"Basic {base64.b64encode(account.encode()).decode()}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextmanager
def postgres(folder: Path, port: int) -> Iterator[None]:
    """A new cluster with the databases of compose.yaml, on loopback, with passwords."""
    assert PROGRAMS is not None
    folder.mkdir()
    (folder / "password").write_text(VALUES["POSTGRES_PASSWORD"])
    shutil.chown(folder, "postgres")
    data, programs = folder / "data", PROGRAMS

    def by_postgres(*words: str) -> None:
        subprocess.run(["runuser", "-u", "postgres", "--", *words], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    auth = ["--username=vdmini", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256"]
    by_postgres(str(programs / "initdb"), f"--pgdata={data}", *auth)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
    by_postgres(str(programs / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        where = ["-h", "127.0.0.1", "-p", str(port), "-U", "vdmini", "postgres"]
        environment = {**os.environ, "PGPASSWORD": VALUES["POSTGRES_PASSWORD"]}
        for line in rendered()["configs"]["databases"]["content"].splitlines():
            subprocess.run(["psql", *where, "-c", line], check=True, env=environment, stdout=subprocess.DEVNULL)
        yield
    finally:
        by_postgres(str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")


def rendered() -> dict[str, Any]:
    return compose(**{**example(), **VALUES})


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Addresses of MLflow and Prefect, run as compose.yaml says but for the places of their neighbours."""
    tmp_path.chmod(0o755)
    for above in tmp_path.parents[:2]:
        above.chmod(0o755)  # PostgreSQL's user has to pass
    database, store, mlflow_port, prefect_port = (free_port() for _ in range(4))
    found = rendered()

    def here(text: str) -> str:
        for name, place in {
            "@postgres/": f"@127.0.0.1:{database}/",
            "http://s3:8333": f"http://127.0.0.1:{store}",
        }.items():
            text = text.replace(name, place)
        return text.replace("/run/mlflow-auth.ini", str(tmp_path / "auth.ini"))

    (tmp_path / "auth.ini").write_text(here(found["configs"]["mlflow-auth"]["content"]))

    def start(name: str, port: int, health: str) -> Any:
        service = found["services"][name]
        words = [{"0.0.0.0": "127.0.0.1", "5000": str(port), "4200": str(port)}.get(w, w) for w in service["command"]]
        values = {key: here(value) for key, value in service["environment"].items()}
        values |= {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api"}
        url = f"http://127.0.0.1:{port}{health}"
        return running([sys.executable, "-m", *words], tmp_path / f"{name}.log", lambda: status(url) == 200, **values)

    moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(store)]
    with ExitStack() as stack:
        stack.enter_context(postgres(tmp_path / "postgres", database))
        stack.enter_context(running(moto, tmp_path / "s3.log", lambda: status(f"http://127.0.0.1:{store}/") == 200))
        bucket = found["services"]["bucket"]
        values = {key: here(value) for key, value in bucket["environment"].items()}
        for _ in range(2):  # the second time it is there
            subprocess.run(
                [sys.executable, *bucket["command"][1:]], check=True, env={**os.environ, **values}, cwd=tmp_path
            )
        stack.enter_context(start("mlflow", mlflow_port, "/health"))
        stack.enter_context(start("prefect", prefect_port, "/api/health"))
        yield f"http://127.0.0.1:{mlflow_port}", f"http://127.0.0.1:{prefect_port}/api"


def test_runs_and_models_go_to_servers_that_refuse_strangers(
    servers: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow, prefect = servers
    experiments = f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    for address, account in (
        (experiments, f"vdmini:{VALUES['MLFLOW_ADMIN_PASSWORD']}"),
        (f"{prefect}/admin/version", "vdmini:prefect71"),
    ):
        assert (status(address), status(address, "vdmini:guess"), status(address, account)) == (401, 401, 200)
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    for name, value in {
        "MLFLOW_TRACKING_URI": mlflow.replace("//", f"//vdmini:{VALUES['MLFLOW_ADMIN_PASSWORD']}@"),
        "MLFLOW_TRACKING_USERNAME": "",
        "MLFLOW_TRACKING_PASSWORD": "",
        "PREFECT_API_URL": prefect,
        "PREFECT_API_AUTH_STRING": VALUES["PREFECT_AUTH_STRING"],
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    (project / "model").mkdir()
    (project / "weights.txt").write_text("weights")
    with open_tracker("register", {"a": 1}, project / ".scratch/tracking") as tracker:
        tracker.log({"quality/content": 0.5}, 0)
        tracker.artifact(project / "weights.txt")
        assert register_model("m", "champion", project / "model", {"vdmini.digest": "d"}, {}, tracker.run_id) == 1
    assert model_tags("models:/m@champion")["vdmini.digest"] == "d"
    assert os.environ["MLFLOW_TRACKING_URI"] == mlflow  # the password has moved to where nobody prints it
    import boto3

    assert any(key.endswith("artifacts/weights.txt") for key in stored_objects(boto3, tmp_path))
    (project / "dvc.yaml").write_text(DVC)
    (project / "source.txt").write_text("source")
    (project / "params.yaml").write_text("distill: {loop: {max_steps: 1, batch_size: 1}}\n")
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, check=True)
    done = subprocess.run([sys.executable, "-m", "flows.cli", "run", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)["stages"] == {"first": "ran", "middle": "ran", "last": "ran"}, done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in VALUES.values())


def stored_objects(boto3: Any, folder: Path) -> dict[str, int]:
    """Keys and sizes in MLflow's bucket."""
    port = next(word for word in (folder / "s3.log").read_text().split() if word.startswith("http://127.0.0.1:"))
    account = {"aws_access_key_id": VALUES["S3_ACCESS_KEY"], "aws_secret_access_key": VALUES["S3_SECRET_KEY"]}
    bucket = boto3.resource("s3", endpoint_url=port, region_name="us-east-1", **account).Bucket("mlflow")
    return {found.key: found.size for found in bucket.objects.all()}
