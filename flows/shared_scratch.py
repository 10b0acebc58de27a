"""What a stage has half done, in the DVC remote's own storage, so that another worker goes on from there.

Below `vdmini/<key>/` of the remote lie a stage's scratch files under their own names; the key is the digest of all that
DVC says the stage depends on. What a clone has of other runs stays there: a stage touches the folder that it works in,
and only folders that are new or touched since the order began are sent, with the files beside them, which several runs
share.

Files do not change once they have their names, so what is there is not sent again. Of a checkpoint `step-*` the file
checkpoint.json goes last and is removed first: a folder without it is none. What arrives gets its name when it is
whole, and the stage compares digests before it uses it.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.processes import Logger, grace_s
from flows.transfers import TransferFailed
from vdmini_core.artifacts import json_digest
from vdmini_core.settings import Params

SCRATCH = {
    "distill": Path(".scratch/checkpoints"),
    "sensitivity": Path(".scratch/sensitivity"),
    "decoder": Path(".scratch/decoder"),
}
"""Stages that go on from what they find there."""
VIDEOS = Path(".scratch/videos")
LAST = "checkpoint.json"
FAREWELL_SHARE = 0.4  # of the time that a flow has to end, after the training has saved its state


def shared_scratch(root: Path, stage: str, params: Params) -> "SharedScratch | None":
    """The shared place of what is to be done, or None for a stage that keeps nothing; its inputs have to be here."""
    from dvc.repo import Repo

    if stage not in SCRATCH:
        return None
    with Repo(str(root)) as repo:
        (found,) = (one for one in repo.index.stages if getattr(one, "name", None) == stage)
        found.save_deps()
        deps = {dep.def_path: str(dep.hash_info.value) for dep in found.deps if dep.hash_info}
        section = getattr(params, stage).model_dump(mode="json")
        key = json_digest({"stage": stage, "params": section, "deps": deps})
        remote = repo.cloud.get_remote()
        base, folder = remote.fs.join(remote.path, "vdmini", key[:32]), root / SCRATCH[stage]
        idle = {run.name: run.stat().st_mtime_ns for run in folder.glob("*") if run.is_dir()}
        return SharedScratch(remote.fs, base, folder, idle)


def shared_videos(root: Path, *names: str) -> "SharedScratch":
    """The shared place of a benchmark's videos: of all shards by their key, of one by the key and its name."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        remote = repo.cloud.get_remote()
        return SharedScratch(remote.fs, remote.fs.join(remote.path, "vdmini", *names), root.joinpath(VIDEOS, *names))


@dataclass(frozen=True)
class SharedScratch:
    """Files of `folder`, and those of `base` on DVC's file system `fs`.

    `idle` has the folders of `folder` that other runs left, and when these were last touched.
    """

    fs: Any
    base: str
    folder: Path
    idle: Mapping[str, int] = field(default_factory=dict)

    def push(self) -> int:
        """Send what is not there yet, and remove checkpoints that newer ones replace; how many files were sent."""
        with _as_transfer(f"sending {self.folder}"):
            here, there = self._here(), self._there()
            new = [name for name in here if name not in there and not _grows(name)]
            for name in [*filter(_grows, here), *new] if new else ():
                # A checkpoint that is removed meanwhile has a newer one, which the next look finds.
                with contextlib.suppress(FileNotFoundError):
                    self.fs.put_file(str(self.folder / name), self._path(name))
            for name in sorted(there, key=_is_last, reverse=True):
                if _is_of_step(name) and self._is_outdated(name):
                    self.fs.rm_file(self._path(name))
            return len(new)

    def pull(self) -> int:
        """Fetch what is whole there and missing here; how many files came."""
        with _as_transfer(f"fetching {self.folder}"):
            there = self._there()
            whole = [name for name in there if not _is_of_step(name) or _beside(name, LAST) in there]
            missing = [name for name in whole if not (self.folder / name).exists() and not _grows(name)]
            for name in [*filter(_grows, whole), *sorted(missing, key=_is_last)] if missing else ():
                self._fetch(name)
            return len(missing)

    def saved(self) -> frozenset[str]:
        """Names of what is there; a stage that gets on adds some."""
        with _as_transfer(f"looking into {self.base}"):
            return frozenset(self._there())

    def clear(self) -> None:
        """Remove all of it from the remote: the stage is done."""
        with _as_transfer(f"removing {self.base}"):
            for name in sorted(self._there(), key=_is_last, reverse=True):
                self.fs.rm_file(self._path(name))

    @contextmanager
    def pushed(self, every_s: float, logger: Logger) -> Iterator[None]:
        """Push now and then while the body runs, and once more where it fails; an outage does not disturb the body."""
        done, farewell_s = threading.Event(), grace_s(FAREWELL_SHARE)

        def try_to_push() -> None:
            try:
                if sent := self.push():
                    logger.info("%d files of %s are in the shared store", sent, self.folder.name)
            except TransferFailed as error:
                logger.warning("%s; the next look tries again", error)

        def work() -> None:
            while not done.wait(every_s):
                try_to_push()

        thread = threading.Thread(target=work, name="shared-scratch", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            done.set()
            last = threading.Thread(target=try_to_push, name="shared-scratch-last", daemon=True)
            last.start()
            last.join(farewell_s)
            raise
        finally:
            done.set()

    def _is_outdated(self, name: str) -> bool:
        """Whether a checkpoint was removed here for a newer one; later ones than any here are another worker's."""
        step = (self.folder / name).parent
        return not step.exists() and any(step.name < newer.name for newer in step.parent.glob("step-*"))

    def _fetch(self, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.partial")
        self.fs.get_file(self._path(name), str(draft))
        draft.replace(target)

    def _here(self) -> list[str]:
        """Files of this order that are finished; what makes a checkpoint whole comes last."""
        idle = {run.name for run in self.folder.glob("*") if self.idle.get(run.name) == run.stat().st_mtime_ns}
        names = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
        finished = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        return sorted((name.as_posix() for name in finished if name.parts[0] not in idle), key=_is_last)

    def _there(self) -> set[str]:
        self.fs.fs.invalidate_cache()
        if not self.fs.exists(self.base):
            return set()
        names = {Path(self.fs.relpath(path, self.base)) for path in self.fs.find(self.base)}
        # A store that is a file system may have what a killed worker was sending, under a hidden name.
        return {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}

    def _path(self, name: str) -> str:
        return str(self.fs.join(self.base, *name.split("/")))


def _is_last(name: str) -> bool:
    return name.endswith(LAST)


def _grows(name: str) -> bool:
    """Whether a file is appended to: histories, which go along with what is new."""
    return name.endswith(".jsonl")


def _is_of_step(name: str) -> bool:
    return "/step-" in f"/{name.rpartition('/')[0]}"


def _beside(name: str, other: str) -> str:
    return "/".join([*name.split("/")[:-1], other])


@contextmanager
def _as_transfer(name: str) -> Iterator[None]:
    """The storage's errors, of which each has its own, as TransferFailed."""
    try:
        yield
    except Exception as error:
        raise TransferFailed(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
