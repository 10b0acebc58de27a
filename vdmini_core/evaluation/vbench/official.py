"""Runs the official VBench code, one dimension a process, and believes its result file alone.

The official command exits 0 when it failed, only warns of missing videos, and writes its result at the end; a hanging
download never ends. So each dimension gets a fresh folder and a time limit, and counts only if its result file is
whole, finite and of all its videos.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vdmini_core.artifacts import Record, json_digest, read_json, write_json
from vdmini_core.evaluation.vbench.scores import parse_scores, whole_json
from vdmini_core.evaluation.vbench.suite import Suite
from vdmini_core.reporting import Track, silent_track

SCRIPTS = {"t2v": "evaluate.py", "i2v": "evaluate_i2v.py"}
LEAVES_OUT_VIDEOS = ("color", "temporal_flickering")
"""Dimensions whose official result lists only the videos it could judge (where the object was found; that opened)."""
LOG_TAIL = 600

Status = Literal["scored", "failed", "timed out", "no result", "partial result"]


class Attempt(Record):
    """What became of one dimension: a score, or why there is none and where the official code's own words are.

    `per_prompt` is the mean of each prompt's videos, in the unit of the score, where the result has such numbers.
    """

    dimension: str
    status: Status
    score: float | None = None
    reason: str = ""
    videos: int = 0
    expected: int
    log: str
    per_prompt: dict[str, float] = Field({}, repr=False)
    fingerprint: str

    @property
    def scored(self) -> bool:
        """Whether the score counts."""
        return self.status == "scored"


@dataclass(frozen=True)
class Official:
    """The official code: a checkout, the Python of its own environment, and how long a dimension may take."""

    checkout: Path
    python: str
    timeout_s: float
    ratio: str = "16-9"

    def check(self, suite: str) -> None:
        """FileNotFoundError where there is no such checkout or interpreter, before hours of generating."""
        script = self.checkout / SCRIPTS[suite]
        if not script.is_file():
            raise FileNotFoundError(f"{script} does not exist; expected a checkout of github.com/Vchitect/VBench")
        if shutil.which(self.python) is None:
            raise FileNotFoundError(
                f"{self.python} is no program; expected the Python of the environment that VBench is installed in"
            )

    def command(self, suite: str, dimension: str, full_info: Path, videos: Path, output: Path) -> list[str]:
        """The official command of one dimension."""
        paths = {"--output_path": output, "--full_json_dir": full_info, "--videos_path": videos}
        command = [self.python, str(self.checkout.resolve() / SCRIPTS[suite]), "--dimension", dimension]
        command += [word for option, path in paths.items() for word in (option, str(path.resolve()))]
        return command + (["--ratio", self.ratio] if suite == "i2v" else [])

    def commit(self) -> str:
        """The checkout's commit, or `unknown`."""
        try:
            done = subprocess.run(
                ["git", "-C", str(self.checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return done.stdout.strip()


def evaluate(
    official: Official, suite: Suite, videos: Path, folder: Path, track: Track = silent_track
) -> dict[str, Attempt]:
    """Evaluate every dimension that has no score of just these videos yet; what failed is tried again.

    `folder` keeps an attempt, its log and its result file a dimension.
    """
    official.check(suite.name)
    dimensions = suite.dimensions()
    found = {}
    for dimension in track(dimensions, "VBench", len(dimensions)):
        found[dimension] = evaluate_dimension(official, suite, dimension, videos, folder / dimension)
    return found


def evaluate_dimension(official: Official, suite: Suite, dimension: str, videos: Path, folder: Path) -> Attempt:
    """One dimension in one process; an earlier score of the same videos by the same code is kept."""
    names = suite.videos(dimension)
    fingerprint = json_digest(
        [suite.only([dimension]).digest(), official.commit(), official.ratio, [_identity(videos / n) for n in names]]
    )
    record = folder / "attempt.json"
    if record.is_file():
        earlier = read_json(record, Attempt)
        if earlier.scored and earlier.fingerprint == fingerprint:
            return earlier
    shutil.rmtree(folder, ignore_errors=True)
    output, log, full_info = folder / "results", folder / "log.txt", folder / "full_info.json"
    output.mkdir(parents=True)
    full_info.write_text(json.dumps(suite.only([dimension]).entries, indent=1))
    command = official.command(suite.name, dimension, full_info, videos, output)
    code = run_limited(command, official.checkout, log, official.timeout_s)
    facts = {"dimension": dimension, "expected": len(names), "log": str(log), "fingerprint": fingerprint}
    if code is None:
        reason = f"no end after {official.timeout_s:g} s; stopped. {_tail(log)}"
        attempt = Attempt(status="timed out", reason=reason, **facts)
    elif code != 0:
        attempt = Attempt(status="failed", reason=f"exit code {code}. {_tail(log)}", **facts)
    else:
        attempt = judged(output, suite, dimension, log, facts)
    write_json(record, attempt)
    return attempt


def judged(output: Path, suite: Suite, dimension: str, log: Path, facts: dict[str, Any]) -> Attempt:
    """What a process that exited with 0 left behind."""
    files = sorted(output.glob("*_eval_results.json"))
    if not files:
        return Attempt(status="no result", reason=f"exit code 0, but no result file. {_tail(log)}", **facts)
    try:
        content = whole_json(files[-1])
        scores, _, _ = parse_scores(content, files[-1].name)
    except ValueError as error:
        return Attempt(status="partial result", reason=str(error), **facts)
    entry = next((value for key, value in content.items() if key == dimension), None)
    if dimension not in scores or not isinstance(entry, list):
        return Attempt(status="partial result", reason=f"{files[-1].name} has no score of {dimension}", **facts)
    per_video = video_scores(entry, suite.videos(dimension))
    missing = [name for name in suite.videos(dimension) if name not in per_video]
    if not per_video or (missing and dimension not in LEAVES_OUT_VIDEOS):
        reason = f"{files[-1].name} has {len(per_video)} of {facts['expected']} videos; missing are {missing[0]!r}, ..."
        return Attempt(status="partial result", reason=reason, videos=len(per_video), **facts)
    return Attempt(
        status="scored",
        score=scores[dimension],
        videos=len(per_video),
        per_prompt=prompt_means(dimension, per_video, suite.prompts(dimension)),
        **facts,
    )


def video_scores(entry: list[Any], names: Sequence[str]) -> dict[str, float]:
    """Each asked-for video's own score in [score, ..., [{video_path, video_results}, ...]]; NaN if it is no number."""
    wanted = set(names)
    found: dict[str, float] = {}
    for item in entry[-1] if isinstance(entry[-1], list) else []:
        if isinstance(item, dict) and (name := Path(str(item.get("video_path"))).name) in wanted:
            value = item.get("video_results")
            found[name] = float(value) if isinstance(value, int | float) else math.nan
    return found


def prompt_means(dimension: str, per_video: dict[str, float], prompts: Sequence[str]) -> dict[str, float]:
    """Means over each prompt's videos; {} where a video's score is no number. imaging_quality lists percent."""
    if any(math.isnan(value) for value in per_video.values()):
        return {}
    scale = 0.01 if dimension == "imaging_quality" else 1.0
    groups: dict[str, list[float]] = {}
    for name, value in per_video.items():
        groups.setdefault(name.rsplit("-", 1)[0], []).append(scale * value)
    return {prompt: math.fsum(groups[prompt]) / len(groups[prompt]) for prompt in prompts if prompt in groups}


def run_limited(command: Sequence[str], cwd: Path, log: Path, timeout_s: float) -> int | None:
    """Run a command with its output in `log`; its exit code, or None where it had to be ended with all it started."""
    with log.open("wb") as stream:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            stream.write(f"{command[0]} cannot be started: {error}\n".encode())
            return 127
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers, too, and also when we are interrupted
            process.wait()


def _identity(path: Path) -> list[Any]:
    facts = path.stat() if path.is_file() else None
    return [path.name, facts and facts.st_size, facts and facts.st_mtime_ns]


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace").strip()
    return f"Its last words: {text[-LOG_TAIL:]}" if text else "It said nothing."
