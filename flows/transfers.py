"""Git and DVC across machines: what is sent and fetched, again with back-off where the network failed.

A transfer that fails for want of what it was asked for (no remote, data that nobody pushed, a full disk) fails at once.
"""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flows.processes import Logger, StageFailed, run_logged

T = TypeVar("T")

PATIENCE_S = 180.0  # of all attempts of a transfer together
LONGEST_PAUSE_S = 20.0
# What no second attempt mends; DVC and git say it in words only.
PERMANENT = (
    "configuration error",
    "config file error",
    "no remote",
    "neither locally nor on remote",
    "No space left on device",
    "Disk quota exceeded",
    "does not exist as an output or a stage name",
    "AccessDenied",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "Unable to locate credentials",
    "NoSuchBucket",
    "not our ref",
    "does not appear to be a git repository",
    "is supported, but requires",
    "is not supported for",
)
TRANSPORT = ("unexpected error", "failed to transfer", "files failed to", "Failed to pull run cache")
"""How DVC tells of a storage that did not answer; it words its own errors, those of wrong input, otherwise."""
# DVC logs an entry of the run-cache that did not arrive, and ends with success.
LOST = ("ERROR: ", "WARNING: Failed to pull run cache")


class TransferFailed(StageFailed):
    """Data did not get through; the message says what was tried for how long."""


def with_back_off(action: Callable[[], T], name: str, logger: Logger, patience_s: float = PATIENCE_S) -> T:
    """`action`, again after TransferFailed until it is done or time is up; pauses double, up to LONGEST_PAUSE_S."""
    started, pause = time.monotonic(), 1.0
    while True:
        try:
            return action()
        except TransferFailed as error:
            spent = time.monotonic() - started
            if spent + pause > patience_s or any(text in str(error) for text in PERMANENT):
                raise
            logger.warning("%s failed after %.0f s, again in %.0f s: %s", name, spent, pause, str(error)[-300:])
        time.sleep(pause * random.uniform(0.8, 1.2))  # many workers of one store should not come back as one
        pause = min(2 * pause, LONGEST_PAUSE_S)


def transfer(words: list[str], root: Path, logger: Logger) -> None:
    """A DVC command that only moves data, such as `push`; TransferFailed if that cannot be brought about."""
    name = f"dvc {' '.join(words)}"

    def attempt() -> None:
        lost = list[str]()

        def note(line: str) -> None:
            lost.extend([line] if line.startswith(LOST) else [])

        try:
            run_logged([sys.executable, "-m", "dvc", "--wait-for-lock", *words], name, root, None, logger, note)
        except StageFailed as error:
            raise TransferFailed(str(error)) from None
        if lost:
            raise TransferFailed(f"{name} left something behind:\n" + "\n".join(lost))

    with_back_off(attempt, name, logger)


def git(root: Path, *words: str) -> str:
    """What a git command prints, or TransferFailed with what it says."""
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TransferFailed(f"git {' '.join(words)} failed in {root}: {done.stderr.strip()[-500:]}")
    return done.stdout.rstrip()
