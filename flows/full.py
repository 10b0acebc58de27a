"""Flow "vdmini": DVC's graph, one Prefect task a stage; DVC decides what is stale, Prefect shows it.

The flow holds no stage list of its own. Each task runs `dvc repro --single-item <stage>`, so a
`dvc repro` right after a flow finds nothing to do, and the reverse.
"""

import base64
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from flows.graph import Outcome, Result, lock_digest, repro, stage_graph
from flows.placement import check_pools, place
from flows.processes import Logger
from flows.run_lock import hold
from tasks._tracking import Status, finish_parent, start_parent
from vdmini_core.settings import LOCAL, load_params

MAX_EMBEDDED_BYTES = 1_000_000  # of a picture that is stored in Prefect's database


@task(task_run_name="{name}", cache_policy=NO_CACHE)
def stage(name: str, parent_run_id: str | None) -> Outcome:
    """One DVC stage; what it leaves for readers becomes Prefect artifacts."""
    root, logger = Path.cwd(), get_run_logger()
    result = repro(name, root, parent_run_id, logger)
    return shown(name, root, result, logger)


@task(task_run_name="{name} on {pool}", cache_policy=NO_CACHE)
def stage_on_pool(name: str, pool: str, parent_run_id: str | None) -> Outcome:
    """One DVC stage on a work pool, brought back from there."""
    root, logger = Path.cwd(), get_run_logger()
    return shown(name, root, place(name, root, parent_run_id, logger), logger)


def shown(name: str, root: Path, result: Result, logger: Logger) -> Outcome:
    """The outcome of a stage, which is published on Prefect's page of the run."""
    logger.info("%s: %s", name, result)
    try:
        publish(name, root / "artifacts")
    except Exception as error:  # showing a result must not fail the stage that made it
        logger.warning("the artifacts of %s are not shown in Prefect: %s", name, error)
    return Outcome(result, lock_digest(root, name))


def publish(name: str, folder: Path) -> None:
    """Show the stage's readable results, those that exist, on Prefect's page of the run."""
    pages = {
        "sensitivity": "sensitivity/table.md",
        "plan": "plan/plan.md",
        "distill": "distill/validation.md",
        "decoder": "decoder/decoder.md",
        "evaluate": "evaluate/summary.md",
    }
    if name in pages and (page := folder / pages[name]).is_file():
        create_markdown_artifact(page.read_text(), key=f"{name}-{page.stem}", description=str(page))
    for plot, key in (("sensitivity", "sensitivity-plot"), ("depth", "depth-plot")):
        if name == "sensitivity" and (picture := folder / f"sensitivity/{plot}.png").is_file():
            publish_plot(picture, key)
    report = folder / "evaluate/report.html"
    if name == "evaluate" and report.is_file():
        note = "a file on the worker's machine: copy the address, or `vdmini report --open`"
        create_link_artifact(report.as_uri(), link_text=str(report), key="evaluate-report", description=note)


def publish_plot(plot: Path, key: str) -> None:
    """Show a picture on Prefect's page of the run; a large one as a link."""
    if plot.stat().st_size <= MAX_EMBEDDED_BYTES:
        picture = "data:image/png;base64," + base64.b64encode(plot.read_bytes()).decode()
        create_image_artifact(picture, key=key, description=str(plot))
    else:
        create_link_artifact(plot.as_uri(), link_text=str(plot), key=key)


def commit_tags(root: Path) -> dict[str, str]:
    """The git commit and whether files differ from it, for a run's tags; empty without git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}


def headline_metrics(path: Path) -> dict[str, float]:
    """The numbers of artifacts/evaluate/metrics.json; none if there is no such file."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


@dataclass
class ParentRun:
    """MLflow's run of a whole flow: its id, None without a server, and what it is given when it ends."""

    id: str | None
    tags: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)


@contextmanager
def parent_run(name: str, root: Path) -> Iterator[ParentRun]:
    """Open the run; it ends FINISHED, FAILED (an exception) or KILLED (a cancellation or a signal)."""
    run = ParentRun(start_parent(name), commit_tags(root))
    status: Status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except Exception:
        raise
    except BaseException:
        status = "KILLED"
        raise
    finally:
        finish_parent(run.id, status, run.tags, run.metrics)


@flow(name="vdmini", log_prints=True)
def vdmini(target: str | None = None) -> dict[str, str]:
    """Bring every stage up to date, or those that `target` needs; what DVC did with each, in order.

    Raises ValueError for invalid params.yaml or an unknown target before any stage runs, StageFailed
    when one fails.
    """
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    edges = stage_graph(root, target)
    pools = {name: params.resources_of(name).pool for name in edges}
    placed = {name: pool for name, pool in pools.items() if pool != LOCAL}
    check_pools(placed)
    states: dict[str, State[Outcome]] = {}
    results: dict[str, str] = {}
    title = "vdmini" if target is None else f"vdmini up to {target}"
    with hold(root, "a run", get_run_logger()), parent_run(title, root) as parent:
        parent.tags["vdmini.target"] = target or "all"
        for name, above in edges.items():
            # Called, not submitted: Prefect delivers a cancellation to the main thread only.
            before = [states[other] for other in above]
            if name in placed:
                state = stage_on_pool(name, placed[name], parent.id, return_state=True, wait_for=before)
                parent.tags[f"pool.{name}"] = placed[name]
            else:
                state = stage(name, parent.id, return_state=True, wait_for=before)
            states[name] = state
            outcome = states[name].result()
            results[name] = outcome.result
            parent.tags[f"stage.{name}"] = outcome.result
            parent.tags[f"lock.{name}"] = str(outcome.lock_digest)
            if name == "evaluate":
                parent.metrics |= headline_metrics(root / "artifacts/evaluate/metrics.json")
    return results
