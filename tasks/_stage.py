"""What every stage gets around its 20 lines: validated params, tracking, progress, signals, provenance."""

import errno
import importlib
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import diffusers
import torch
import transformers
from accelerate import PartialState
from tqdm import tqdm

from vdmini_core.artifacts import Provenance, disk_is_full, folder_digest, json_digest
from vdmini_core.settings import Params, Settings, load_params

if TYPE_CHECKING:
    from tasks._tracking import Tracker

T = TypeVar("T")

STAGES = ("data", "teacher", "encode", "sensitivity", "plan", "prune", "distill", "decoder", "evaluate", "register")
ARTIFACTS = Path("artifacts")
SCRATCH = Path(".scratch")

SAME_REQUEST_S = 10.0
"""Within it a further SIGTERM is the same request: a flow that is stopped signals all it started, and so does each of
these that started something itself."""

# The last part of the settings, of the stage and of `data`, on which its hunger depends.
MEMORY_KEYS = ("batch_size", "frames", "size")
DISK_KEYS = ("keep_checkpoints", "teacher_draws", "train_clips", "test_clips")
RESUMABLE = {
    "distill": ". distill.loop.accumulate above 1 and distill.checkpointing need less, and go on where it was",
    "decoder": ". decoder.frames, decoder.crop and decoder.loop.accumulate make a step smaller",
}


@dataclass
class Context:
    """One stage's surroundings. Paths are relative to the project's root, the working directory.

    Of several processes the main one alone has a tracker, and writes.
    """

    stage: str
    params: Params
    tracker: "Tracker"
    device: torch.device
    main: bool = True
    stopping: bool = False

    @property
    def settings(self) -> Settings:
        return params_of(self.params, self.stage)

    @property
    def folder(self) -> Path:
        """Where the stage's outputs go; DVC empties it before the stage runs."""
        folder = ARTIFACTS / self.stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def input(self, stage: str) -> Path:
        """The output folder of an earlier stage."""
        folder = ARTIFACTS / stage
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; run `dvc repro {stage}` first")
        return folder

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """A progress bar on stderr."""
        return progress(items, description, total)

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        tqdm.write(text)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.tracker.log(metrics, step)

    def should_stop(self) -> bool:
        """True after SIGTERM: long work then saves a checkpoint and ends."""
        return self.stopping

    def provenance(self, **inputs: str) -> Provenance:
        """What produces this stage's results, with the digests of what they were made from."""
        return provenance(self.settings.model_dump(mode="json"), self.device, inputs)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """A progress bar on stderr; a line in five seconds where that is no terminal."""
    interval = 0.1 if sys.stderr.isatty() else 5.0
    return iter(tqdm(items, description, total, mininterval=interval, dynamic_ncols=True))


def provenance(params: dict[str, Any], device: torch.device, inputs: dict[str, str]) -> Provenance:
    """What produces a result here and now, from these parameters and inputs (name -> digest)."""
    packages = ("vdmini", "torch", "diffusers", "transformers")
    vectors = torch.backends.cpu.get_cpu_capability()  # sums differ in their last digits between these
    return Provenance(
        commit=_git("rev-parse", "HEAD"),
        dirty=changed_files() != (),
        params=params,
        params_digest=json_digest(params),
        inputs=inputs,
        software={"python": platform.python_version(), **{name: version(name) for name in packages}},
        machine=f"{platform.machine()} with {vectors}, {torch.get_num_threads()} threads, {device_name(device)}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def device_name(device: torch.device) -> str:
    """The accelerator's name, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def run_tags(provenance: Provenance, outputs: str) -> dict[str, str]:
    """What a run of a stage says of itself; by the digest of its outputs a lineage finds the run that made them."""
    return {
        "git.commit": provenance.commit,
        "git.dirty": str(provenance.dirty).lower(),
        "vdmini.machine": provenance.machine,
        "vdmini.threads": str(torch.get_num_threads()),
        "vdmini.processes": os.environ.get("WORLD_SIZE", "1"),
        "vdmini.software": json.dumps(provenance.software),
        "vdmini.outputs": outputs,
    }


def params_of(params: Params, stage: str) -> Settings:
    """The section of a stage."""
    return getattr(params, "register_" if stage == "register" else stage)  # type: ignore[no-any-return]


def run_stage(name: str) -> None:
    """Run one stage in the working directory; what `vdmini stage NAME` and dvc.yaml call.

    `accelerate launch ... -m flows.cli stage distill` runs it in several processes.
    """
    if name not in STAGES:
        raise ValueError(f"there is no stage {name!r}; the stages are {', '.join(STAGES)}")
    params = load_params(Path("params.yaml"))
    quieten()
    from tasks._tracking import open_tracker

    module = importlib.import_module(f"tasks.{name}")
    settings = params_of(params, name).model_dump(mode="json")
    with processes(name) as (device, main):
        level = logging.INFO if main else logging.ERROR
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
        with open_tracker(name, settings, SCRATCH / "tracking" / name) if main else nullcontext() as tracker:
            context = Context(name, params, tracker, device, main)
            end_on_sigterm(context, after_a_checkpoint=name in RESUMABLE)
            with resources_explained(context):
                module.run(context)
            if main:
                tracker.tags(run_tags(context.provenance(), folder_digest(context.folder)))


def end_on_sigterm(context: Context, *, after_a_checkpoint: bool) -> None:
    """From now on SIGTERM ends the process: at once, or first lets training save its state; asked again, at once.

    What comes within SAME_REQUEST_S of the first is not asked again.
    """
    first: float | None = None

    def stop(number: int, frame: object) -> None:
        nonlocal first
        now, again = time.monotonic(), first is not None
        if first is not None and now - first <= SAME_REQUEST_S:
            return  # what the first led to, be it the end of the run's records, goes on
        first = now if first is None else first
        if again or not after_a_checkpoint:
            raise SystemExit(128 + number)
        context.stopping = True

    signal.signal(signal.SIGTERM, stop)


def half_done(root: Path, fingerprint: str) -> Path:
    """The folder in `root` for what a run leaves to the next of its fingerprint, touched where it is there already.

    A worker sends what its order made or touched (flows/shared_scratch.py), and not what its clone has of other runs.
    """
    folder = root / fingerprint[:16]
    if folder.is_dir():
        os.utime(folder)
    return folder


@contextmanager
def resources_explained(context: Context) -> Iterator[None]:
    """Say which settings to change when memory (MemoryError) or disk (OSError) runs out."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        if disk_is_full(error):
            free = shutil.disk_usage(Path.cwd()).free
            raise OSError(
                errno.ENOSPC,
                f"stage {context.stage}: the disk of {Path.cwd()} is full, {free / 1e9:.3g} GB are free ({reason}). "
                f"Make room ({SCRATCH / 'checkpoints'} keeps those of earlier settings, which may go)"
                f"{_settings_text(context, DISK_KEYS, ', or lower ')}; then the same command goes on",
            ) from error
        if _memory_is_full(error):
            raise MemoryError(
                f"stage {context.stage} is out of memory ({reason}). Give it more"
                f"{_settings_text(context, MEMORY_KEYS, ', or lower ')}{RESUMABLE.get(context.stage, '')}"
            ) from error
        raise


def _memory_is_full(error: BaseException) -> bool:
    # PyTorch has no class of its own for the CPU's.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _settings_text(context: Context, leaves: tuple[str, ...], lead: str) -> str:
    """`lead` and the settings in question with their values, or nothing if the stage has none."""
    from tasks._tracking import flatten

    sections = {context.stage: context.settings, "data": context.params.data}
    flat = flatten({name: section.model_dump(mode="json") for name, section in sections.items()})
    found = [f"{key} ({value})" for key, value in flat.items() if key.rsplit(".", 1)[1] in leaves]
    return lead + " or ".join(found) if found else ""


@contextmanager
def processes(stage: str) -> Iterator[tuple[torch.device, bool]]:
    """This process's device, and whether it is the main one of those that a launcher started, as it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu"), True
        return
    if stage != "distill":
        raise ValueError(f"stage {stage} runs in one process; start it without a launcher: vdmini stage {stage}")
    # The main process validates and writes checkpoints alone, while the others wait for it.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    yield state.device, state.is_main_process
    state.destroy_process_group()


def quieten() -> None:
    """Leave the screen to the stage's own progress."""
    for noisy in ("httpx", "alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def changed_files() -> tuple[str, ...] | None:
    """The tracked files that differ from the commit; None without git."""
    names = _git("diff", "--name-only", "-z", "HEAD")
    return None if names == "unknown" else tuple(name for name in names.split("\0") if name)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    run_stage(sys.argv[1])
