"""DVC's graph and its stages: order and edges, and what DVC does when it is asked to bring one up to date."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Literal

import yaml

from flows.processes import Logger, StageFailed, run_logged
from flows.transfers import LOST, TRANSPORT, TransferFailed
from vdmini_core.artifacts import json_digest

Result = Literal["ran", "placed", "restored", "skipped"]


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


def repro(name: str, root: Path, parent_run_id: str | None, logger: Logger) -> Result:
    """Run one stage through DVC; raises StageFailed if its command fails."""
    results: list[Result] = []
    run_logged(repro_command(name), f"stage {name!r}", root, parent_run_id, logger, results_of(name, results.append))
    return results[0] if results else "ran"


def restore(name: str, root: Path, logger: Logger) -> Result | None:
    """Skip a stage or restore its result, from the remote if need be; None where DVC would have to run it.

    Where DVC would run the stage it is given a shell that runs nothing, at which it fails by itself: stopped at the
    wrong moment it leaves a lock that no later command can read. Raises TransferFailed where the remote cannot be
    asked, which may pass, and StageFailed for wrong input, which does not.
    """
    results: list[Result] = []
    lost: list[str] = []

    def found(result: Result) -> None:
        results.append(result)
        if result == "ran":
            logger.info("the result of %s is not to be had; DVC's next words say that its command was not run", name)

    note_result = results_of(name, found)

    def note(line: str) -> None:
        if "ran" not in results:
            lost.extend([line] if line.startswith(LOST) else [])
        note_result(line)

    try:
        command = ["env", "SHELL=false", *repro_command(name), "--pull"]
        run_logged(command, f"restoring {name!r}", root, None, logger, note)
    except StageFailed as error:
        if "ran" in results:
            if lost:
                problem = f"the remote could not be asked for {name!r}:\n" + "\n".join(lost)
                raise TransferFailed(problem) from None
            return None
        if any(text in line for text in TRANSPORT for line in [*lost, str(error)]):
            raise TransferFailed(str(error)) from None
        raise
    return results[0] if results else "skipped"


def repro_command(name: str) -> list[str]:
    """DVC's command for one stage."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]


def results_of(name: str, tell: Callable[[Result], None]) -> Callable[[str], None]:
    """What is to be called with each line that DVC prints; it tells what becomes of the stage."""
    marks: dict[str, Result] = {
        f"Running stage '{name}':": "ran",
        f"Stage '{name}' is cached - skipping run, checking out outputs": "restored",
        f"Pulling data for stage: '{name}'": "restored",
        f"Stage '{name}' didn't change, skipping": "skipped",
    }

    def note(line: str) -> None:
        if line in marks:
            tell(marks[line])

    return note


def lock_digest(root: Path, name: str) -> str | None:
    """sha256 of the stage's entry in dvc.lock, or None without one."""
    path = root / "dvc.lock"
    entry = yaml.safe_load(path.read_text())["stages"].get(name) if path.is_file() else None
    return None if entry is None else json_digest(entry)


def inputs_of(root: Path, name: str) -> list[str]:
    """What DVC keeps of a stage's dependencies: the outputs of other stages that it reads, in order."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        outs = {Path(out.fs_path): out.def_path for stage in repo.index.stages for out in stage.outs}
        (found,) = (stage for stage in repo.index.stages if getattr(stage, "name", None) == name)
        read = [Path(dep.fs_path) for dep in found.deps]
    return sorted({name for out, name in outs.items() if any(dep == out or out in dep.parents for dep in read)})
