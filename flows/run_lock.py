"""One run at a time in a project's folder: a lock that ends with its process, and says who has it."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.processes import Logger

LOOK_EVERY_S = 1.0
SAY_EVERY_S = 60.0


@contextmanager
def hold(root: Path, what: str, logger: Logger) -> Iterator[None]:
    """Hold the folder for `what`, such as "a run"; waits for others of the same kind, and says for whom.

    Raises RuntimeError if the folder is at work for something else: a run that waits for a worker in its own folder
    would wait for ever.
    """
    path = root / ".scratch" / "run.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as stream:
        said = -SAY_EVERY_S
        while not _taken(stream.fileno()):
            stream.seek(0)
            holder = _holder(stream.read())
            if holder is not None and holder["what"] != what:
                raise RuntimeError(
                    f"{root} is at work for {holder['what']} (process {holder['pid']}) and cannot serve {what} as "
                    "well; a worker needs a clone of its own"
                )
            if time.monotonic() - said > SAY_EVERY_S:
                whose = "another process" if holder is None else f"{holder['what']} of process {holder['pid']}"
                logger.warning("%s is at work for %s; waiting for its end", root, whose)
                said = time.monotonic()
            time.sleep(LOOK_EVERY_S)
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps({"pid": os.getpid(), "what": what}))
        stream.flush()
        yield  # closing the file ends the lock


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(text: str) -> dict[str, str] | None:
    try:
        found: dict[str, str] = json.loads(text)
    except json.JSONDecodeError:  # it is just being written
        return None
    return found
