"""What may go wrong, one scenario at a time: each says what happened, what is left, and how long it took to recover."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from benchmarks.cluster.machines import Service, wait_until
from benchmarks.cluster.readings import (
    alive,
    cancel,
    log_text,
    mlflow_steps,
    overlap,
    scores,
    training_pids,
    worker_spans,
)
from benchmarks.cluster.site import ON_POOL, POOL, Site
from vdmini_core.artifacts import write_json

DONE_S = 900.0


@dataclass
class Result:
    """A row of the table; `checks` are claims, each true or false."""

    scenario: str
    happened: str = ""
    checks: dict[str, bool] = field(default_factory=dict)
    states: str = ""
    recovery_s: float | None = None
    wall_s: float | None = None


class Run:
    """A run of vdmini/full, and what Prefect and MLflow say of it and of its runs on the pool."""

    def __init__(self, site: Site, target: str = "distill") -> None:
        self.site, self.started = site, time.monotonic()
        self.id: UUID = site.order(target)

    def state(self) -> Any:
        return self._flow_run().state

    def _flow_run(self) -> Any:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            return client.read_flow_run(self.id)

    def on_pool(self) -> list[Any]:
        """The pool's runs of this scenario's orders, oldest first."""
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowFilter, FlowFilterName

        since = self._flow_run().expected_start_time
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["stage"])), limit=200)
        return sorted((run for run in runs if run.created >= since), key=lambda run: run.created)

    def wait(self) -> float:
        """Seconds from the order to the end."""

        def ended() -> bool:
            try:
                return bool(self.state().is_final())
            except Exception:  # the server is away in some scenarios
                return False

        wait_until(ended, f"run of scenario {self.site.scenario}", DONE_S, 0.5)
        return time.monotonic() - self.started

    def states(self) -> str:
        return f"full {self.state().name}; on the pool {', '.join(run.state.name for run in self.on_pool()) or 'none'}"


def reference(site: Site) -> dict[str, Any]:
    """The weights and the time of the same recipe in place, undisturbed; kept beside what is prepared."""
    file = site.prepared / "reference.json"
    if not file.is_file():
        site.begin("in-place", {})
        run = Run(site)
        wall = run.wait()
        assert run.state().is_completed(), run.state()
        write_json(file, {"weights": site.weights(), "wall_s": wall})
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def finish(site: Site, run: Run, result: Result) -> Result:
    """The checks that every scenario which ends well has to pass."""
    result.wall_s = run.wait()
    result.states = run.states()
    result.checks |= {
        "full completed": run.state().is_completed(),
        "weights bit-equal": run.state().is_completed() and site.weights() == reference(site)["weights"],
        "dvc up to date": site.is_clean(),
        "driver trained nothing": not site.driver_ran("distill"),
    }
    return result


def training(site: Site, worker: int, steps: int = 8) -> None:
    """Wait until a worker is in the middle of distill, with a checkpoint that is whole in the store."""
    clone = site.workers[worker]
    wait_until(lambda: clone.steps() and clone.steps()[-1] >= steps and site.stored_steps(), "training", DONE_S)


def place(site: Site) -> Result:
    """A stage on the pool, undisturbed."""
    result = Result("place", "distill placed on the pool and restored on the driver")
    inside = reference(site)["wall_s"]
    site.begin(result.scenario, ON_POOL)
    site.start_worker(0)
    run = Run(site)
    finish(site, run, result)
    assert result.wall_s is not None
    result.happened += f"; in place {inside:.0f} s, placed {result.wall_s:.0f} s: {result.wall_s - inside:+.0f} s"
    result.checks["no checkpoint left in the store"] = not site.stored_steps()
    return result


def worker_killed(site: Site) -> Result:
    """The worker and all it runs are gone from one moment to the next."""
    result = Result("worker-killed")
    reference(site)
    site.begin(result.scenario, ON_POOL)
    first = site.start_worker(0)
    run = Run(site)
    training(site, 0)
    first.kill()
    killed, at = time.monotonic(), site.stored_steps()[-1]
    site.start_worker(1)
    other = site.workers[1]
    wait_until(lambda: any(step > at for step in other.steps()), "the other worker's first checkpoint", DONE_S)
    result.recovery_s = time.monotonic() - killed
    finish(site, run, result)
    log = log_text([each.id for each in run.on_pool()])
    result.happened = f"kill -9 of worker and training with step {at} in the store; the other took over"
    result.checks["went on from the store"] = "goes on from" in log
    result.checks["lost run is Crashed"] = any(each.state.is_crashed() for each in run.on_pool())
    return result


def cancelled(site: Site) -> Result:
    """Somebody presses Cancel, and orders it again."""
    result = Result("cancelled")
    reference(site)
    site.begin(result.scenario, ON_POOL)
    site.start_worker(0)
    run = Run(site)
    training(site, 0)
    before = site.workers[0].steps()[-1]
    pids = training_pids(site.workers[0].folder)
    cancel(run.id)
    asked = time.monotonic()
    wait_until(lambda: not alive(pids), "the training process to end", 120)
    gone = time.monotonic() - asked
    run.wait()
    ended = time.monotonic() - asked
    steps = site.workers[0].steps()
    states = run.states()
    result.checks = {
        "training gone within 10 s": gone < 10,
        "leaves a checkpoint": bool(steps) and steps[-1] >= before,
        "it is in the store": bool(steps) and steps[-1] in site.stored_steps(),
        "both Cancelled": run.state().is_cancelled() and all(each.state.is_cancelled() for each in run.on_pool()),
    }
    again = Run(site)
    finish(site, again, result)
    result.states = f"{states}; then {result.states}"
    result.happened = (
        f"cancelled as the UI does: training gone after {gone:.1f} s, all ended after {ended:.0f} s; again"
    )
    result.recovery_s = gone
    return result


def s3_down(site: Site) -> Result:
    """The store is away, as inputs are sent and in training."""
    result = Result("s3-down", "S3 refuses connections for 20 s as inputs are sent, and for 20 s in training")
    undisturbed = reference(site)["wall_s"]
    site.begin(result.scenario, ON_POOL)
    site.start_worker(0)
    before = site.proxy.requests
    run = Run(site)
    wait_until(lambda: site.proxy.requests > before + 5, "the first transfers", DONE_S, 0.05)
    outage(site)
    training(site, 0)
    outage(site)
    finish(site, run, result)
    assert result.wall_s is not None
    result.recovery_s = result.wall_s - undisturbed
    result.checks["transfers met it"] = " failed after " in log_text([run.id, *(each.id for each in run.on_pool())])
    return result


def outage(site: Site, seconds: float = 20.0) -> None:
    """S3 refuses connections."""
    site.proxy.down()
    time.sleep(seconds)
    site.proxy.up()


def s3_errors(site: Site) -> Result:
    """The store is overloaded all the time."""
    result = Result("s3-errors")
    reference(site)
    site.begin(result.scenario, ON_POOL)
    site.start_worker(0)
    site.proxy.error_rate, site.proxy.requests, site.proxy.errors = 0.1, 0, 0
    try:
        run = Run(site)
        finish(site, run, result)
    finally:
        site.proxy.error_rate = 0.0
    result.happened = f"{site.proxy.errors} of {site.proxy.requests} requests answered with 503"
    result.checks["there were errors"] = site.proxy.errors > 0
    return result


def prefect_restarted(site: Site) -> Result:
    """The server is killed in training and comes back."""
    result = Result("prefect-restarted")
    reference(site)
    site.begin(result.scenario, ON_POOL)
    site.start_worker(0)
    run = Run(site)
    training(site, 0)
    site.services["prefect"].kill()
    time.sleep(10)
    site.services["prefect"].start()
    back = time.monotonic()
    wait_until(lambda: reachable(run), "the server", 120)
    result.recovery_s = time.monotonic() - back
    finish(site, run, result)
    result.happened = "server killed -9 in training and started again after 10 s"
    result.checks["one run on the pool"] = len(run.on_pool()) == 1
    return result


def reachable(run: Run) -> bool:
    """Whether Prefect answers."""
    try:
        return run.state() is not None
    except Exception:
        return False


def mlflow_down(site: Site) -> Result:
    """The tracking server is away in training."""
    result = Result("mlflow-down", "MLflow stopped for a minute in training")
    reference(site)
    site.begin(result.scenario, ON_POOL)
    site.start_worker(0)
    run = Run(site)
    training(site, 0)
    site.services["mlflow"].kill()
    time.sleep(60)
    site.services["mlflow"].start()
    back = time.monotonic()
    finish(site, run, result)
    result.recovery_s = time.monotonic() - back
    status, steps = mlflow_steps(site)
    result.checks["MLflow has every step"] = steps == list(range(40))
    result.checks["MLflow run FINISHED"] = status == "FINISHED"
    return result


def disk_full(site: Site) -> Result:
    """The worker has no room for a checkpoint."""
    result = Result("disk-full")
    reference(site)
    site.begin(result.scenario, ON_POOL)
    scratch = site.workers[0].folder / ".scratch" / "checkpoints"
    scratch.mkdir(parents=True, exist_ok=True)
    # Room for the history and no checkpoint.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(scratch)], check=True)
    try:
        site.start_worker(0)
        run = Run(site)
        run.wait()
        text = f"{run.state().message}"
        states = run.states()
    finally:
        site.stop_workers()
        subprocess.run(["umount", str(scratch)], check=True)
    result.checks = {
        "Failed, not Crashed": run.state().name == "Failed" and len(run.on_pool()) == 1,
        "says what is full": "is full" in text or "No space left" in text,
        "no half checkpoint": not site.stored_steps(),
    }
    site.start_worker(0)
    freed = time.monotonic()
    again = Run(site)
    finish(site, again, result)
    result.recovery_s = time.monotonic() - freed
    result.states = f"{states}; then {result.states}"
    result.happened = "no room for a checkpoint on the worker; room made, ordered again"
    return result


def fan_out(site: Site) -> Result:
    """The units of sensitivity over two workers, beside one process's answer; each clone has its own teacher."""
    result = Result("fan-out")
    teacher, without = ".scratch/deep-teacher", ("teacher", "encode", "sensitivity", "plan", "prune")
    for clone in (site.driver, *site.workers):
        clone.call("-m", "benchmarks.cluster.deep_teacher", teacher)
    changes = {"teacher": {"source": teacher}}
    file = site.prepared / "serial.json"
    if not file.is_file():
        site.begin("serial", {}, without, changes)
        run = Run(site, "sensitivity")
        wall = run.wait()
        write_json(file, {"scores": scores(site), "wall_s": wall})
    serial = json.loads(file.read_text())
    parts = {"sensitivity": {"pool": POOL, "parts": 2, "push_checkpoints_s": 2.0}}
    site.begin(result.scenario, parts, without, changes)
    site.start_worker(0)
    site.start_worker(1)
    run = Run(site, "sensitivity")
    result.wall_s = run.wait()
    result.states = run.states()
    spans = worker_spans(run.on_pool())
    result.checks = {
        "full completed": run.state().is_completed(),
        "50 units or more": len(serial["scores"]) >= 50,
        "equal to the serial run": run.state().is_completed() and scores(site) == serial["scores"],
        "both workers had some": len(spans) == 2,
        "never two at once on a worker": not any(overlap(each) for each in spans.values()),
        "driver measured nothing": not site.driver_ran("sensitivity"),
    }
    units = len(serial["scores"])
    result.happened = (
        f"{units} units in rounds over two workers; serial {serial['wall_s']:.0f} s, {result.wall_s:.0f} s"
    )
    return result


def sweeps(site: Site) -> Result:
    """Two drivers with settings of their own order from one worker, and keep what came as an experiment of DVC's.

    An experiment is saved of a whole recipe only.
    """
    result = Result("sweeps")
    reference(site)
    quick = {"decoder": {"enabled": False}}
    site.begin(result.scenario, ON_POOL, changes=quick)
    other = site.workers[1]
    site.furnish(other)
    site.write_recipe(other, ON_POOL, {**quick, "distill": {"learning_rate": 5.0e-4}})
    site.start_worker(0)
    run = Run(site, "register")
    command = [other.python, "-m", "flows.cli", "run"]
    log = site.folder / "logs" / "other-driver.log"
    second = Service("other driver", command, other.folder, other.environment, log)
    second.start()
    site.services["other driver"] = second
    assert second.process is not None
    finish(site, run, result)
    left = second.process.wait(DONE_S)
    for name, clone in (("as-it-was", site.driver), ("slower", other)):
        clone.call("-m", "dvc", "exp", "save", "-q", "-n", name)
    spans = worker_spans(run.on_pool())
    result.checks |= {
        "the other driver completed": left == 0,
        "with weights of its own": left == 0 and site.weights(other) != site.weights(),
        "both on the one worker": len(spans.get("first", ())) == 2,
        "never two at once on it": not any(overlap(each) for each in spans.values()),
        "each has its experiment": all(
            name in clone.call("-m", "dvc", "exp", "list", "--name-only")
            for name, clone in (("as-it-was", site.driver), ("slower", other))
        ),
    }
    result.wall_s = time.monotonic() - run.started
    result.happened = "two clones with another learning rate each, one worker"
    return result


SCENARIOS: dict[str, Callable[[Site], Result]] = {
    "place": place,
    "worker-killed": worker_killed,
    "cancelled": cancelled,
    "s3-down": s3_down,
    "s3-errors": s3_errors,
    "prefect-restarted": prefect_restarted,
    "mlflow-down": mlflow_down,
    "disk-full": disk_full,
    "fan-out": fan_out,
    "sweeps": sweeps,
}
