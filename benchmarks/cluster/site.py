"""The whole site: git origin, S3 behind a faulty proxy, Prefect, MLflow on PostgreSQL, a driver and two workers."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml

from benchmarks.cluster.faulty_proxy import FaultyProxy
from benchmarks.cluster.machines import HOST, Clone, Postgres, Service, answers, free_port, run, wait_until
from vdmini_core.artifacts import folder_digest

BUCKET = "vdmini"
POOL, DRIVERS = "gpu", "vdmini-local"
RECIPE: dict[str, Any] = {
    "data": {"groups_per_class": 3},
    "encode": {"train_clips": 24, "test_clips": 12},
    "sensitivity": {
        "clips": 4,
        "steps": 1,
        "batch_size": 2,
        "latency_runs": 1,
        "gate_clips": 4,
        "calibration_clips": 2,
    },
    "distill": {
        "loop": {"max_steps": 40, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 4, "log_every": 1},
        "discriminator": {"warmup_steps": 1, "ramp_steps": 2},
    },
    "evaluate": {"clips": 4, "steps": 1, "gallery": 1},
    "register": {"min_content_recovery": -100.0, "min_motion_recovery": -100.0},
}
ON_POOL = {"distill": {"pool": POOL, "push_checkpoints_s": 2.0}}


class Site:
    """Everything below `folder`; what is there from an earlier call is used again, servers are started anew."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        self.ports = {name: free_port() for name in ("postgres", "s3", "proxy", "prefect", "mlflow")}
        self.services: dict[str, Service] = {}
        self.scenario = "setup"
        # What is made once is made anew for other code.
        self.prepared = folder / run(["git", "rev-parse", "HEAD"], repository).strip()[:12]

    def start(self) -> None:
        """Servers, clones, deployments, and the driver's worker; the pool has none yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        self._servers()
        self._clones()
        self._prepare()
        self.driver.call("-m", "flows.deployment")
        self.worker("driver", self.driver, DRIVERS).start()

    def stop(self) -> None:
        for service in reversed(self.services.values()):
            service.stop()
        self.postgres.stop()

    def _servers(self) -> None:
        self.postgres = Postgres(self.folder / "postgres", self.ports["postgres"])
        self.postgres.start("mlflow")
        python = [sys.executable, "-m"]
        urls = {name: f"http://{HOST}:{port}" for name, port in self.ports.items()}
        packages = [path for path in sys.path if path.endswith("site-packages") or Path(path, "moto").is_dir()]
        kept = ("PATH", "HOME", "LANG", "OMP_NUM_THREADS", "TMPDIR")
        plain = {name: os.environ[name] for name in kept if name in os.environ}
        plain |= {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        plain |= {"AWS_ACCESS_KEY_ID": "vdmini", "AWS_SECRET_ACCESS_KEY": "vdmini", "AWS_DEFAULT_REGION": "us-east-1"}
        plain |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONUNBUFFERED": "1"}
        self.environment = plain | {"PREFECT_API_URL": f"{urls['prefect']}/api", "MLFLOW_TRACKING_URI": urls["mlflow"]}
        self.packages = packages
        of_servers = plain | {"PYTHONPATH": os.pathsep.join(packages), "PREFECT_HOME": str(self.folder / "prefect")}
        (self.folder / "prefect").mkdir(exist_ok=True)
        store = [
            "--backend-store-uri",
            self.postgres.url("mlflow"),
            "--artifacts-destination",
            str(self.folder / "mlflow"),
        ]
        commands = {
            "s3": [*python, "moto.server", "-H", HOST],
            "prefect": [*python, "prefect", "server", "start", "--host", HOST],
            "mlflow": [*python, "mlflow", "server", "--host", HOST, "--workers", "1", *store],
        }
        for name, command in commands.items():
            log = self.folder / "logs" / f"{name}.log"
            values = of_servers | ({"PREFECT_API_URL": f"{urls['prefect']}/api"} if name == "prefect" else {})
            command = [*command, "-p" if name == "s3" else "--port", str(self.ports[name])]
            self.services[name] = Service(name, command, self.folder, values, log)
            self.services[name].start()
        for name, path in (("s3", "/moto-api/"), ("prefect", "/api/health"), ("mlflow", "/health")):
            wait_until(lambda url=urls[name] + path: answers(url), f"{name} to answer")
        self.proxy = FaultyProxy(self.ports["proxy"], urls["s3"])
        self.s3.create_bucket(Bucket=BUCKET)
        os.environ["PREFECT_API_URL"] = self.environment["PREFECT_API_URL"]  # for this process's own questions
        os.environ["PREFECT_HOME"] = str(self.folder / "prefect-client")

    @property
    def s3(self) -> Any:
        import boto3

        key = {"aws_access_key_id": "vdmini", "aws_secret_access_key": "vdmini", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://{HOST}:{self.ports['s3']}", **key)

    def stored_steps(self) -> list[int]:
        """The training steps of checkpoints that are whole in the store, in this scenario."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{self.scenario}/vdmini/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return sorted(int(key.split("/step-")[1].split("/")[0]) for key in keys if key.endswith("checkpoint.json"))

    def _clones(self) -> None:
        origin = self.folder / "origin.git"
        if not origin.is_dir():
            run(["git", "init", "-q", "--bare", "--initial-branch=main", str(origin)], self.folder)
        run(["git", "push", "-q", "--force", str(origin), "HEAD:main"], self.repository)
        names = ("driver", "first", "second")
        self.driver, *self.workers = (
            Clone(origin, self.folder / name, self.environment, self.packages) for name in names
        )
        _update(self.driver)
        committed = yaml.safe_load((self.driver.folder / "params.yaml").read_text())
        self.recipe = {name: {**section, **RECIPE.get(name, {})} for name, section in committed.items()}
        self.write_recipe(self.driver, {})
        self.driver.call("-m", "dvc", "remote", "add", "-q", "-f", "-d", "store", f"s3://{BUCKET}/setup")
        endpoint = f"http://{HOST}:{self.ports['proxy']}"
        self.driver.call("-m", "dvc", "remote", "modify", "-q", "store", "endpointurl", endpoint)
        git = ["git", "-c", "user.name=cluster", "-c", "user.email=cluster@example.org"]
        run(["git", "add", "params.yaml", ".dvc/config"], self.driver.folder)
        run([*git, "commit", "-q", "--allow-empty", "-m", "the cluster's recipe and store"], self.driver.folder)
        run(["git", "push", "-q", "origin", "HEAD:main", "--force"], self.driver.folder)
        for clone in self.workers:
            _update(clone)

    def _prepare(self) -> None:
        """All that distill needs, made once in the driver and kept beside it."""
        if not (self.prepared / "dvc.lock").is_file():
            self.driver.call("-m", "dvc", "repro", "prune")
            for name in ("artifacts", ".dvc/cache"):
                shutil.copytree(self.driver.folder / name, self.prepared / name, dirs_exist_ok=True)
            shutil.copy(self.driver.folder / "dvc.lock", self.prepared / "dvc.lock")

    def begin(
        self,
        scenario: str,
        resources: dict[str, Any],
        without: tuple[str, ...] = (),
        changes: dict[str, Any] | None = None,
    ) -> None:
        """Everything is made but distill, and `without`; nothing is left of scenarios before."""
        self.scenario = scenario
        self.stop_workers()
        for clone in (self.driver, *self.workers):
            clone.forget()
            clone.remote_is(f"s3://{BUCKET}/{scenario}")
        self.furnish(self.driver, without)
        self.write_recipe(self.driver, resources, changes)

    def furnish(self, clone: Clone, without: tuple[str, ...] = ()) -> None:
        """Give a clone that has nothing what is prepared."""
        for name in ("artifacts", ".dvc/cache"):
            shutil.copytree(self.prepared / name, clone.folder / name)
        lock = yaml.safe_load((self.prepared / "dvc.lock").read_text())
        for name in without:
            del lock["stages"][name]
            shutil.rmtree(clone.folder / "artifacts" / name)
        if without:
            shutil.rmtree(clone.folder / ".dvc/cache/runs", ignore_errors=True)
        (clone.folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))

    def worker(self, name: str, clone: Clone, pool: str) -> Service:
        """A worker of a pool in a clone; not started."""
        command = [clone.python, "-m", "flows.cli", "worker", "--pool", pool, "--name", name]
        log = self.folder / "logs" / f"worker-{name}.log"
        self.services[name] = Service(name, command, clone.folder, clone.environment, log)
        return self.services[name]

    def start_worker(self, number: int) -> Service:
        """Worker 0 or 1 of the pool, started."""
        service = self.worker(("first", "second")[number], self.workers[number], POOL)
        service.start()
        return service

    def stop_workers(self) -> None:
        for name in ("first", "second"):
            if name in self.services:
                self.services.pop(name).stop()

    def order(self, target: str = "distill") -> UUID:
        """`prefect deployment run vdmini/full` for a target; the run's id."""
        text = self.driver.call(
            "-m", "prefect", "deployment", "run", "vdmini/full", "--param", f"target={target}", "--tag", self.scenario
        )
        (line,) = (line for line in text.splitlines() if "UUID:" in line)
        return UUID(line.split("UUID:")[1].strip())

    def weights(self, clone: Clone | None = None) -> str:
        """The digest of the distilled weights of a clone, the driver's by default."""
        return folder_digest((clone or self.driver).folder / "artifacts/distill/denoiser")

    def is_clean(self) -> bool:
        """Whether `dvc repro distill` on the driver has nothing to do."""
        text = self.driver.call("-m", "dvc", "repro", "distill")
        return "up to date" in text and "Running stage" not in text

    def driver_ran(self, stage: str) -> bool:
        """Whether the driver itself did the work of a stage."""
        return (self.driver.folder / ".scratch/tracking" / stage).exists()

    def write_recipe(self, clone: Clone, resources: dict[str, Any], changes: dict[str, Any] | None = None) -> None:
        """A clone's params.yaml: the commit's, with budgets of seconds, `changes`, and placed as `resources` says."""
        changed = {name: {**section, **(changes or {}).get(name, {})} for name, section in self.recipe.items()}
        text = yaml.safe_dump({**changed, "resources": resources}, sort_keys=False)
        (clone.folder / "params.yaml").write_text(text)


def _update(clone: Clone) -> None:
    """Bring a clone to the origin's newest commit."""
    run(["git", "fetch", "-q", "origin"], clone.folder)
    run(["git", "checkout", "-q", "--force", "-B", "main", "origin/main"], clone.folder)
