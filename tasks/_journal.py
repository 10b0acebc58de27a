"""What a stage tells its tracker, on disk before anybody else hears of it: one JSON row a line."""

import fcntl
import json
import threading
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Journal:
    """A file of rows that one process appends to. A crash costs at most the row it cut off.

    Rows are `{"run": ...}` (first), `{"metrics": {name: value}, "step": ..., "time_ms": ...}`,
    `{"params": ...}`, `{"tags": ...}`, `{"artifact": path, "folder": ...}`, `{"status": ...}` and,
    once a server knows the run, `{"run_id": ...}`.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._cut_off = file.is_file() and not file.read_bytes().endswith(b"\n")

    def hold(self) -> None:
        """Mark the file as being written, until `release` or the end of this process; BlockingIOError if it is."""
        self._held = self.file.open("a")
        fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """The file is whole."""
        self._held.close()

    def append(self, row: Row) -> None:
        """Write one row; it survives this process, not the machine. Raises OSError on a full disk."""
        line = json.dumps(row, allow_nan=False) + "\n"
        with self._lock, self.file.open("a") as stream:
            stream.write("\n" + line if self._cut_off else line)  # else lost with the row that a crash cut off
            self._cut_off = False

    def read(self, offset: int = 0, most: int | None = None) -> tuple[list[Row], int]:
        """Whole rows from a byte offset on, and the offset after them; a damaged row is left out."""
        rows: list[Row] = []
        with self.file.open("rb") as stream:
            stream.seek(offset)
            for line in islice(stream, most):
                if not line.endswith(b"\n"):  # still being written
                    break
                offset += len(line)
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
        return rows, offset
