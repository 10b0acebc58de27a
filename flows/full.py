"""Flow "vdmini": DVC's graph, one Prefect task a stage; DVC decides what is stale, Prefect shows it.

The flow holds no stage list of its own. Each task runs `dvc repro --single-item <stage>`, so a
`dvc repro` right after a flow finds nothing to do, and the reverse.
"""

import base64
import codecs
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from flows.services import end_tree
from tasks._tracking import PARENT_VARIABLE, Status, finish_parent, start_parent
from vdmini_core.artifacts import json_digest
from vdmini_core.settings import load_params

Result = Literal["ran", "restored", "skipped"]
Logger = logging.Logger | logging.LoggerAdapter[Any]

PROGRESS_EVERY_S = 15.0  # a progress bar redraws many times a second; each logged line goes to the server
MAX_EMBEDDED_BYTES = 1_000_000  # of a picture that is stored in Prefect's database
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class StageFailed(RuntimeError):
    """A stage's command ended with an error; the message names the stage and holds its last lines."""


@dataclass(frozen=True)
class Outcome:
    """What DVC did with one stage, and the digest of the stage's entry in dvc.lock afterwards."""

    result: Result
    lock_digest: str | None


def stage_graph(root: Path, target: str | None = None) -> dict[str, tuple[str, ...]]:
    """DVC's stages in an order that respects its edges, each with the stages it depends on.

    With `target`, only that stage and its ancestors. Raises ValueError listing the stages for an
    unknown target.
    """
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    with Repo(str(root)) as repo:
        graph = repo.index.graph
        stages = {stage.addressing: stage for stage in repo.index.stages if isinstance(stage, PipelineStage)}
        edges = {
            name: tuple(above.addressing for above in graph.successors(stage) if above.addressing in stages)
            for name, stage in stages.items()
        }
    order = list(TopologicalSorter(edges).static_order())
    if target is not None:
        if target not in edges:
            raise ValueError(f"expected one of the stages {', '.join(order)}, got target {target!r}")
        wanted = {target}
        for name in reversed(order):
            wanted |= set(edges[name]) if name in wanted else set()
        order = [name for name in order if name in wanted]
    return {name: edges[name] for name in order}


def read_lines(stream: int) -> Iterator[tuple[str, bool]]:
    """Lines of a pipe as they arrive; True marks a progress bar's, which ends in a carriage return."""
    decode, rest = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
    while chunk := os.read(stream, 65536):
        rest += decode(chunk)
        # A final "\r" waits for the next chunk: it may be half of "\r\n".
        *parts, rest = re.split(r"(\r\n|\n|\r(?!$))", rest)
        for text, end in zip(parts[::2], parts[1::2], strict=True):
            yield ANSI.sub("", text).rstrip(), end == "\r"
    yield ANSI.sub("", rest).rstrip(), False


def repro(name: str, root: Path, parent_run_id: str | None, logger: Logger) -> Result:
    """Run one stage through DVC; raises StageFailed if its command fails."""
    marks: dict[str, Result] = {
        f"Running stage '{name}':": "ran",
        f"Stage '{name}' is cached - skipping run, checking out outputs": "restored",
        f"Stage '{name}' didn't change, skipping": "skipped",
    }
    results: list[Result] = []

    def note(line: str) -> None:
        results.extend([marks[line]] if line in marks else [])

    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    run_logged(command, f"stage {name!r}", root, parent_run_id, logger, note)
    return results[0] if results else "ran"


def run_logged(
    command: list[str],
    name: str,
    root: Path,
    parent_run_id: str | None,
    logger: Logger,
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Run a command, its output live in `logger` and every line in `note`; whatever stops us stops it too.

    Raises StageFailed, which calls it `name`, if the command fails.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", PARENT_VARIABLE: parent_run_id or ""}
    environment.pop("MLFLOW_RUN_ID", None)
    tail: deque[str] = deque(maxlen=15)
    logged = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    created = psutil.Process(process.pid).create_time()
    assert process.stdout is not None
    try:
        for line, is_progress in read_lines(process.stdout.fileno()):
            note(line)
            if line and (not is_progress or time.monotonic() - logged > PROGRESS_EVERY_S):
                logger.info("%s", line)
                logged = time.monotonic()
            if line and not is_progress:
                tail.append(line)
        code = process.wait()
    except BaseException:
        logger.warning("stopping %s", name)
        end_tree(process.pid, created)
        process.wait()
        raise
    finally:
        process.stdout.close()
    if code != 0:
        raise StageFailed(f"{name} failed (exit code {code}); its last lines:\n" + "\n".join(tail))


@task(task_run_name="{name}", cache_policy=NO_CACHE)
def stage(name: str, parent_run_id: str | None) -> Outcome:
    """One DVC stage; what it leaves for readers becomes Prefect artifacts."""
    root, logger = Path.cwd(), get_run_logger()
    result = repro(name, root, parent_run_id, logger)
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


def lock_digest(root: Path, name: str) -> str | None:
    """sha256 of the stage's entry in dvc.lock, or None without one."""
    path = root / "dvc.lock"
    entry = yaml.safe_load(path.read_text())["stages"].get(name) if path.is_file() else None
    return None if entry is None else json_digest(entry)


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
    load_params(root / "params.yaml")
    edges = stage_graph(root, target)
    states: dict[str, State[Outcome]] = {}
    results: dict[str, str] = {}
    with parent_run("vdmini" if target is None else f"vdmini up to {target}", root) as parent:
        parent.tags["vdmini.target"] = target or "all"
        for name, above in edges.items():
            # Called, not submitted: Prefect delivers a cancellation to the main thread only.
            states[name] = stage(name, parent.id, return_state=True, wait_for=[states[other] for other in above])
            outcome = states[name].result()
            results[name] = outcome.result
            parent.tags[f"stage.{name}"] = outcome.result
            parent.tags[f"lock.{name}"] = str(outcome.lock_digest)
            if name == "evaluate":
                parent.metrics |= headline_metrics(root / "artifacts/evaluate/metrics.json")
    return results
