"""The metrics of a training on disk: appended as they come, one row a step when written out."""

import json
from pathlib import Path

from vdmini_core.artifacts import write_json


class History:
    """Appends to `file`; a resumed run repeats steps, of which the last word counts."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file() and (text := file.read_text()) and not text.endswith("\n"):
            file.write_text(text + "\n")  # else the next row would be lost with the line that a crash cut off

    def log(self, metrics: dict[str, float], step: int) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")

    def rows(self) -> list[dict[str, float]]:
        """One row a step, in order; a line cut off by a crash is left out."""
        found: dict[int, dict[str, float]] = {}
        for line in self.file.read_text().splitlines() if self.file.is_file() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[row["step"]] = row
        return [found[step] for step in sorted(found)]

    def write(self, target: Path) -> None:
        """Write the rows as one JSON file, `{"rows": [...]}`."""
        write_json(target, {"rows": self.rows()})
