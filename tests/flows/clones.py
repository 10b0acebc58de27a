"""A driver's clone and two workers', which share a DVC remote and a git origin and no other file."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.graph import inputs_of
from flows.order import Order, check_out, order_of
from flows.services import end_tree
from flows.transfers import transfer
from vdmini_core.artifacts import write_json

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("test")
DVC = """
stages:
  prune:
    cmd: python step.py prune source.txt
    deps: [step.py, source.txt]
    outs: [artifacts/prune]
  distill:
    cmd: python step.py distill artifacts/prune/out.txt
    deps: [step.py, artifacts/prune]
    params: [distill]
    outs: [artifacts/distill]
"""
PREFECT = """
name: clones
deployments:
  - name: gpu
    entrypoint: flows/remote.py:stage
    pull:
      - flows.remote.enter_clone: {}
    work_pool:
      name: gpu
"""
# A stage with checkpoints as distill has them: a count, and where it was started.
STEP = """
import json, pathlib, sys, time
name, source = sys.argv[1:]
pathlib.Path(f"ran-{name}.scratch").open("a").write("x")
text, done = pathlib.Path(source).read_text(), 0
folder = pathlib.Path(".scratch/checkpoints/one")
for step in sorted(folder.glob("step-*")):
    if (step / "checkpoint.json").is_file():
        done = json.loads((step / "checkpoint.json").read_text())["step"]
if name == "distill":
    print("starts at", done, flush=True)
    for done in range(done, 6):
        step = folder / f".step-{done + 1}"
        step.mkdir(parents=True)
        (step / "state.safetensors").write_text("state" * (done + 1))
        (step / "checkpoint.json").write_text(json.dumps({"step": done + 1}))
        step.rename(folder / step.name[1:])
        pathlib.Path("pace").exists() and time.sleep(0.5)
target = pathlib.Path("artifacts") / name
target.mkdir(parents=True)
(target / "out.txt").write_text(f"{text} {name}")
"""


def command(folder: Path, *words: str) -> str:
    """What a program prints that is to succeed."""
    done = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


@dataclass(frozen=True)
class Clones:
    """A driver and two workers."""

    driver: Path
    workers: tuple[Path, Path]
    store: Path


def commit(clone: Path) -> None:
    """All that a clone has."""
    command(clone, "git", "add", "--all")
    command(clone, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "x")


def write_clones(folder: Path) -> None:
    """Origin, driver and workers, which name each other by relative paths, so that a copy stands for itself."""
    driver = folder / "driver"
    command(folder, "git", "init", "-q", "--bare", "origin.git")
    command(folder, "git", "clone", "-q", "origin.git", "driver")
    (driver / "dvc.yaml").write_text(DVC)
    (driver / "step.py").write_text(STEP)
    (driver / "source.txt").write_text("source")
    (driver / "prefect.yaml").write_text(PREFECT)
    (driver / "flows").mkdir()
    shutil.copy(ROOT / "flows/remote.py", driver / "flows/remote.py")
    (driver / ".gitignore").write_text("/artifacts/\n/.scratch/\n*.scratch\n/pace\n")
    (driver / "params.yaml").write_text(
        "distill: {loop: {max_steps: 1, batch_size: 1}}\nresources: {distill: {push_checkpoints_s: 0.2}}\n"
    )
    command(driver, sys.executable, "-m", "dvc", "init", "-q")
    command(driver, sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "store", "../store")
    command(driver, "git", "remote", "set-url", "origin", "../origin.git")
    commit(driver)
    command(driver, "git", "push", "-q", "origin", "HEAD")
    command(driver, sys.executable, "-m", "dvc", "repro", "-q", "prune")
    for worker in ("first", "second"):
        command(folder, "git", "clone", "-q", "origin.git", worker)
        command(folder / worker, "git", "remote", "set-url", "origin", "../origin.git")


def distill_order(clones: Clones) -> Order:
    """Distill, its inputs sent, as `place` does it."""
    found = order_of("distill", clones.driver, None, LOG)
    transfer(["push", *inputs_of(clones.driver, "distill")], clones.driver, LOG)
    return found


def start(worker: Path, wanted: Order) -> "subprocess.Popen[str]":
    """What the flow `stage` does on a worker."""
    check_out(wanted, worker, LOG)
    write_json(worker / ".scratch/order.json", wanted)
    words = [sys.executable, "-m", "flows.order", ".scratch/order.json"]
    values = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, cwd=worker, env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def carried_out(worker: Path, wanted: Order) -> str:
    """What carrying it out says."""
    process = start(worker, wanted)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@contextmanager
def serving(worker: Path, name: str) -> Iterator[None]:
    """A worker of the pool `gpu`, for as long as the body lasts."""
    values = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "flows.cli", "worker", "--pool", "gpu", "--name", name]
    with (worker.parent / f"worker-{name}.log").open("w") as log:
        process = subprocess.Popen(words, cwd=worker, env=values, stdout=log, stderr=log, start_new_session=True)
        created = psutil.Process(process.pid).create_time()
    try:
        yield
    finally:
        end_tree(process.pid, created)  # a worker that still has a run waits for it, as long as that takes
        process.wait(60)
