"""Commands that a flow runs: output live in its log, and stopped with all they started when the flow is."""

import codecs
import logging
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from flows.run_lock import inherited
from flows.services import end_tree
from tasks._tracking import PARENT_VARIABLE

Logger = logging.Logger | logging.LoggerAdapter[Any]

GRACE = "VDMINI_GRACE_S"
"""The environment's name for the seconds from SIGTERM to SIGKILL of a flow, which a pool's job template knows."""
PREFECT_GRACE_S = 30.0  # what Prefect gives a flow that is cancelled
STOP_SHARE = 2 / 3  # of the grace, for a command to end with all that it started
PROGRESS_EVERY_S = 15.0  # a progress bar redraws many times a second; each logged line goes to the server
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class StageFailed(RuntimeError):
    """A stage's command ended with an error; the message names the stage and holds its last lines."""


def grace_s(share: float) -> float:
    """A share of the time that whoever stops a flow gives it."""
    return share * float(os.environ.get(GRACE, PREFECT_GRACE_S))


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


def run_logged(
    command: list[str],
    name: str,
    root: Path,
    parent_run_id: str | None,
    logger: Logger,
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Run a command, its output live in `logger` and every line in `note`; whatever stops us stops it too.

    It shares the lock of `root`, if there is one: what outlives a flow that was killed still keeps others out.
    Raises StageFailed, which calls it `name`, if the command fails.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", PARENT_VARIABLE: parent_run_id or ""}
    environment.pop("MLFLOW_RUN_ID", None)
    patience_s = grace_s(STOP_SHARE)
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
        pass_fds=inherited(root),
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
        end_tree(process.pid, created, patience_s)
        process.wait()
        raise
    finally:
        process.stdout.close()
    if code != 0:
        raise StageFailed(f"{name} failed (exit code {code}); its last lines:\n" + "\n".join(tail))
