"""Makes a registered model again from its lineage alone, in a clone of its own, and compares."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from flows.graph import stage_graph
from flows.processes import StageFailed
from flows.services import end_tree
from tasks._lineage import Lineage, Results, lineage_of, registered_metrics, results_in
from tasks._registry import find_version
from vdmini_core.artifacts import Record, read_json, write_json

TARGET = "register"
COMPARED = ("data_digest", "teacher_digest", "removed", "protocol_digest", "model_digest")
DVC = (sys.executable, "-m", "dvc")
# What the environment of a reproduction must not inherit: servers and runs of the present, and numbers of threads.
FOREIGN = ("MLFLOW_", "PREFECT_", "VDMINI_", "MKL_")

Say = Callable[[str], None]
Agreement = Literal["same", "metrics agree", "different"]


class Begun(Record):
    """What a folder of a reproduction was made for; written last, so a folder without it is none."""

    uri: str
    start: str
    lineage: Lineage


@dataclass(frozen=True)
class Comparison:
    """What was found: the same bytes, metrics within the tolerance, or neither; `lines` say it in detail."""

    agreement: Agreement
    lines: tuple[str, ...]


def reproduce(uri: str, root: Path, into: Path | None, start: str, tolerance: float, say: Say) -> Comparison:
    """Run the recipe of a version in a clone and compare the model there with what was registered.

    Results of stages before `start` are fetched where DVC has them; it and later stages are computed, each with the
    threads it had. Without `into` the clone is in the project's scratch folder; what an earlier call began goes on.
    Nothing else in `root` is written. Raises ValueError where the lineage does not suffice or the folder is something
    else's, StageFailed when a stage fails.
    """
    version, lineage = find_version(uri), lineage_of(uri)
    uri = f"models:/{version.name}/{version.version}"  # an alias may move before the next call
    folder = (into or root / ".scratch" / "reproduce" / f"{version.name}-{version.version}").resolve()
    begun = Begun(uri=uri, start=start, lineage=lineage)
    if not folder.is_dir() or not any(folder.iterdir()):
        _prepare(begun, root, folder, say)
    elif not _record(folder).is_file() or read_json(_record(folder), Begun) != begun:
        raise ValueError(
            f"{folder} is not a reproduction of {uri} from stage {start} on; name a new one with --into, or remove it"
        )
    for name in _stages(folder):
        threads = (lineage.stages or {})[name].threads if name in (lineage.stages or {}) else None
        say(
            f"stage {name}: " + (f"{threads} threads" if threads else "threads were not recorded; as this shell has it")
        )
        _run(
            [*DVC, "repro", "--no-run-cache", "--single-item", name],
            folder,
            _environment(folder, threads),
            f"stage {name!r}",
        )
    return compare(lineage, registered_metrics(uri), folder, tolerance)


def _stages(folder: Path) -> list[str]:
    """What the registration needs, in order; DVC names stages by where it is called from."""
    with contextlib.chdir(folder):
        return list(stage_graph(folder, TARGET))


def _record(folder: Path) -> Path:
    return folder / ".scratch" / "reproduction.json"


def _prepare(begun: Begun, root: Path, folder: Path, say: Say) -> None:
    """The clone at the commit with the registered params.yaml and what is fetched instead of computed, or nothing."""
    lineage = begun.lineage
    if lineage.commit is None or lineage.params is None:
        raise ValueError(f"{begun.uri} cannot be made again: its lineage has no commit or no params.yaml")
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        say(f"commit {lineage.commit[:12]} into {folder}")
        _clone(root, lineage.commit, draft)
        (draft / "params.yaml").write_text(lineage.params)
        _begin(begun, root, draft, say)
        write_json(_record(draft), begun)
        if folder.is_dir():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _clone(root: Path, commit: str, folder: Path) -> None:
    """One commit of `root`, also that of a branch which is gone."""
    folder.mkdir(parents=True)
    _git(folder, "init", "--quiet")
    serve = "git -c uploadpack.allowAnySHA1InWant=true upload-pack"
    try:
        _git(folder, "fetch", "--quiet", "--update-shallow", f"--upload-pack={serve}", str(root), commit)
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"{root} has no commit {commit} ({error.stderr.strip().splitlines()[-1]}); "
            "`git fetch` it from where the model was registered"
        ) from None
    _git(folder, "checkout", "--quiet", "--detach", commit)


def _begin(begun: Begun, root: Path, folder: Path, say: Say) -> None:
    """Check the code, and leave in dvc.lock only the stages before `begun.start`, whose results are fetched."""
    lineage, own, stages = begun.lineage, root / ".dvc" / "config.local", _stages(folder)
    if begun.start not in stages:
        raise ValueError(f"expected --start to be one of {', '.join(stages)}, got {begun.start!r}")
    if own.is_file():  # access to remotes; a link, so that no secret is copied
        (folder / ".dvc" / "config.local").symlink_to(own)
    if lineage.dvc_lock is not None:
        (folder / "dvc.lock").write_text(lineage.dvc_lock)
        _check_code(begun.uri, lineage, folder)
        entries = yaml.safe_load(lineage.dvc_lock)
        earlier = stages[: stages.index(begun.start)]
        entries["stages"] = {name: entry for name, entry in entries["stages"].items() if name in earlier}
        (folder / "dvc.lock").write_text(yaml.safe_dump(entries, sort_keys=False))
        _fetch(list(entries["stages"]), root, folder, say)
    elif lineage.changed:
        raise ValueError(
            f"{begun.uri} cannot be made again: {', '.join(lineage.changed)} differed from commit {lineage.commit}"
        )


def _check_code(uri: str, lineage: Lineage, folder: Path) -> None:
    """DVC's own word on whether code and settings here are those that made the registered results."""
    from dvc.repo import Repo

    with contextlib.chdir(folder), Repo() as repo:
        status = repo.status()
    changed = {
        path
        for name, entries in status.items()
        for entry in entries
        if isinstance(entry, dict) and name != TARGET  # DVC wrote of it after it had registered
        for path in entry.get("changed deps", {})
        if not path.startswith("artifacts/")
    }
    if changed:
        raise ValueError(
            f"{uri} cannot be made again: commit {lineage.commit} does not have the {', '.join(sorted(changed))} that "
            "made its results; they were changed when it was registered, and not committed"
        )


def _fetch(stages: list[str], root: Path, folder: Path, say: Say) -> None:
    """Results of stages from the checkout's cache or DVC's remotes; what neither has is computed later."""
    from dvc.repo import Repo

    if not stages:
        return
    with Repo(str(root)) as repo:
        cache = repo.cache.local_cache_dir
    config = folder / ".scratch" / "dvc" / "config"
    config.parent.mkdir(parents=True)
    config.write_text(f"['remote \"checkout\"']\n    url = {cache}\n")
    environment = {**_environment(folder, None), "DVC_SYSTEM_CONFIG_DIR": str(config.parent)}
    for remote in (["--remote", "checkout"], []):
        command = [*DVC, "pull", "--quiet", *remote, *stages]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            say(f"fetched: {', '.join(stages)}")
            return
    say(f"not all of {', '.join(stages)} could be fetched, so that is computed: {done.stderr.strip()[:300]}")


def _environment(folder: Path, threads: int | None) -> dict[str, str]:
    """For commands in the clone: its own code and tracking file, and the number of threads if it is known."""
    values = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", "")])
    values["PYTHONPATH"] = str(folder)
    values["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    return values if threads is None else {**values, "OMP_NUM_THREADS": str(threads)}


def _run(command: list[str], folder: Path, environment: dict[str, str], name: str) -> None:
    """Run a command whose output the user sees; whatever stops us stops it too, with all it started."""
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    created = psutil.Process(process.pid).create_time()
    try:
        code = process.wait()
    except BaseException:
        end_tree(process.pid, created)
        process.wait()
        raise
    if code != 0:
        raise StageFailed(f"{name} failed in {folder} (exit code {code}); the same command goes on from here")


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def compare(lineage: Lineage, metrics: dict[str, float], folder: Path, tolerance: float) -> Comparison:
    """The model in a folder against the registered one; of metrics those that repeat, so no time and no memory."""
    was, made = lineage.results, results_in(folder / "artifacts")
    lines = [_line(name, getattr(was, name), getattr(made, name)) for name in COMPARED]
    same = was.model_digest is not None and was.model_digest == made.model_digest
    if not same:
        lines += _files(was, made)
    lines += _surroundings(lineage, folder)
    values = _json(folder / "artifacts/evaluate/metrics.json")
    pairs = {name: (value, values.get(name)) for name, value in sorted(metrics.items()) if _repeats(name)}
    outside = [name for name, (old, new) in pairs.items() if new is None or not _agree(old, new, tolerance)]
    lines += [f"{name}: registered {pairs[name][0]:.6g}, here {pairs[name][1]}" for name in outside]
    equal = sum(old == new for old, new in pairs.values())
    lines.append(
        f"metrics: {equal} of {len(pairs)} equal, {len(outside)} outside the tolerance of {tolerance:g} "
        "(of the registered value, and for values below 1 absolute)"
    )
    if same:
        return Comparison("same", tuple(lines))
    return Comparison("metrics agree" if pairs and not outside else "different", tuple(lines))


def _line(name: str, was: Any, made: Any) -> str:
    if was is None:
        return f"{name}: not recorded, here {made}"
    return f"{name}: same" if was == made else f"{name}: registered {was}, here {made}"


def _files(was: Results, made: Results) -> list[str]:
    old, new = was.model_files or {}, made.model_files or {}
    return [f"  {name} differs" for name in sorted(old) if old[name] != new.get(name)]


def _surroundings(lineage: Lineage, folder: Path) -> list[str]:
    """What differs between the machine then and the one now, for stage register stands for all."""
    run = (lineage.stages or {}).get(TARGET)
    now = _json(folder / "artifacts/register/verdict.json").get("provenance", {})
    if run is None or not now:
        return []
    found = [] if run.machine == now["machine"] else [f"machine: registered {run.machine}, here {now['machine']}"]
    old = run.software or {}
    differs = [f"{name} {old.get(name)} -> {new}" for name, new in now["software"].items() if old.get(name) != new]
    return found + ([f"software: {', '.join(differs)}"] if differs else [])


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}  # type: ignore[no-any-return]


def _repeats(name: str) -> bool:
    """Whether a metric is of the model and not of the clock."""
    return not name.startswith("speed/") or name.startswith("speed/flop")


def _agree(old: float, new: float, tolerance: float) -> bool:
    return abs(old - new) <= tolerance * max(1.0, abs(old))
