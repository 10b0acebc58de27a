"""Training checkpoints: a folder a step, written beside and renamed, verified before use.

Layout of `step-00000200/`: `state.safetensors` (weights, optimizer moments, averages, all under
dotted names) and `checkpoint.json` (step, fingerprint of the run, sha256 of the tensors), which is
written last. A folder without it, or whose digest differs, is not a checkpoint.
"""

import logging
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from vdmini_core.artifacts import Record, file_digest, read_json, write_json

logger = logging.getLogger(__name__)


class CheckpointManifest(Record):
    """What a checkpoint belongs to."""

    step: int
    fingerprint: str
    sha256: str


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], fingerprint: str, keep: int) -> Path:
    """Write `tensors` as checkpoint `step`, then remove all but the newest `keep`."""
    target = folder / f"step-{step:08d}"
    draft = folder / f".step-{step:08d}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, draft / "state.safetensors")
    manifest = CheckpointManifest(step=step, fingerprint=fingerprint, sha256=file_digest(draft / "state.safetensors"))
    write_json(draft / "checkpoint.json", manifest)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    # Later steps than this are another run's; counting them would remove what was just written.
    for old in [path for path in _folders(folder) if path.name <= target.name][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_newest_checkpoint(folder: Path, fingerprint: str) -> tuple[int, dict[str, Tensor]] | None:
    """Return step and tensors of the newest whole checkpoint of this run, or None to start anew.

    Checkpoints of another run (other settings, data or teacher) are ignored; damaged ones are
    skipped with a warning.
    """
    for candidate in reversed(_folders(folder)):
        try:
            manifest = read_json(candidate / "checkpoint.json", CheckpointManifest)
            if manifest.fingerprint != fingerprint:
                logger.warning("%s belongs to a run with other settings; not resumed", candidate)
                continue
            if file_digest(candidate / "state.safetensors") != manifest.sha256:
                raise ValueError("the digest of state.safetensors differs from checkpoint.json")
            return manifest.step, load_file(candidate / "state.safetensors")
        except (OSError, ValueError) as problem:
            logger.warning("%s is damaged (%s); falling back to the one before", candidate, problem)
    return None


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []
