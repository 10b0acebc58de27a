"""One run at a time in a project's folder: a lock that ends with all that the run started, and says who has it."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil

if TYPE_CHECKING:
    from flows.processes import Logger

DESCRIPTOR = "VDMINI_RUN_LOCK"
"""The environment's name for the number of the lock's open file."""
LOOK_EVERY_S = 1.0
SAY_EVERY_S = 60.0


@contextmanager
def hold(root: Path, what: str, logger: "Logger") -> Iterator[None]:
    """Hold the folder for `what`, such as "a run"; waits for others of the same kind, and says for whom.

    Commands that get the files of `inherited` hold it as well, to the end of the last one. Raises RuntimeError if the
    folder is at work for something else: a run that waits for a worker in its own folder would wait for ever.
    """
    path = _path(root)
    path.parent.mkdir(exist_ok=True)
    said = -SAY_EVERY_S
    while (stream := _taken(path)) is None:
        holder = _holder(path.read_text())
        if holder is not None and holder["what"] != what:
            raise RuntimeError(
                f"{root} is at work for {_described(path, holder)} and cannot serve {what} as well; "
                "a worker needs a clone of its own"
            )
        if time.monotonic() - said > SAY_EVERY_S:
            whose = "another process" if holder is None else _described(path, holder)
            logger.warning("%s is at work for %s; waiting for its end", root, whose)
            said = time.monotonic()
        time.sleep(LOOK_EVERY_S)
    with stream:
        forget_torn_rwlock(root, logger)
        stream.truncate(0)
        stream.write(json.dumps({"pid": os.getpid(), "what": what}))
        stream.flush()
        os.environ[DESCRIPTOR] = str(stream.fileno())
        try:
            yield  # closing the file ends our part of the lock
        finally:
            del os.environ[DESCRIPTOR]


def forget_torn_rwlock(root: Path, logger: "Logger") -> None:
    """Remove DVC's list of who reads and writes what where a process was killed at writing it.

    DVC writes it in place, reads a torn one no more and fails at every command. Its own lock around the file is held
    meanwhile; who has that is just writing.
    """
    folder = root / ".dvc" / "tmp"
    if not _torn(file := folder / "rwlock"):
        return
    from dvc.config import Config
    from dvc.lock import LockError, make_lock

    hardlink = Config(str(root / ".dvc"))["core"].get("hardlink_lock", False)
    with suppress(LockError), make_lock(str(folder / "rwlock.lock"), tmp_dir=str(folder), hardlink_lock=hardlink):
        if _torn(file):
            file.unlink()
            logger.warning("removed %s, which a DVC process that was killed had left unreadable", file)


def inherited(root: Path) -> tuple[int, ...]:
    """The lock's open file, for a command to inherit; nothing where neither we nor who started us holds the folder.

    DVC closes it for the commands of stages, and waits for them: it holds the lock in their place.
    """
    try:
        number = int(os.environ[DESCRIPTOR])
        return (number,) if os.path.samestat(os.fstat(number), _path(root).stat()) else ()
    except (KeyError, OSError):
        return ()


def _torn(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except FileNotFoundError:
        return False
    except json.JSONDecodeError:
        return True
    return False


def _path(root: Path) -> Path:
    return root / ".scratch" / "run.lock"


def _taken(path: Path) -> TextIO | None:
    """The file, locked, or None where somebody has it; who waits does not keep it open."""
    stream = path.open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream


def _holder(text: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:  # it is just being written
        return None
    return found


def _described(path: Path, holder: dict[str, Any]) -> str:
    """Who has the folder; where that is gone and what it started is not, how to end that."""
    text = f"{holder['what']} of process {holder['pid']}"
    if psutil.pid_exists(holder["pid"]) or not (left := _left(path)):
        return text
    words = " ".join(map(str, left))
    return f"{text}, which is gone, but what it started still works: wait for its end, or end it with `kill {words}`"


def _left(path: Path) -> list[int]:
    """What the processes that have the lock wait for, or they themselves if they wait for none.

    Who waits ends when that has ended, a training after its checkpoint, and the lock with it.
    """
    holders, children = set[psutil.Process](), set[psutil.Process]()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it ends meanwhile, or is somebody else's
            if any(opened.path == str(path.resolve()) for opened in process.open_files()):
                holders.add(process)
                children |= set(process.children(recursive=True))
    return sorted(process.pid for process in children - holders or holders)
