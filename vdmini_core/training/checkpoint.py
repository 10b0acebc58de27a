"""Training checkpoints: a folder a step, written beside, forced to the disk, renamed; verified before use.

Layout of `step-00000200/`: `state.safetensors` (weights, optimizer moments, averages, all under
dotted names) and `checkpoint.json` (step, fingerprint of the run, sha256 of the tensors), which is
written last. A folder without it, or whose digest differs, is not a checkpoint. What is half written
or half removed has a hidden name, so that a crash at any moment leaves whole checkpoints only.
"""

import errno
import logging
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from vdmini_core.artifacts import Record, disk_is_full, file_digest, read_json, write_json

logger = logging.getLogger(__name__)


class CheckpointManifest(Record):
    """What a checkpoint belongs to."""

    step: int
    fingerprint: str
    sha256: str


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], fingerprint: str, keep: int, spare: int | None = None
) -> Path:
    """Write `tensors` as checkpoint `step`, then remove all but the newest `keep` and the one of step `spare`.

    When it returns, the checkpoint is on the disk and survives a power cut. Raises OSError (ENOSPC) on a
    full disk, with nothing half written left and every older checkpoint in place.
    """
    target = _folder_of(folder, step)
    draft = folder / f".{target.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        _write(draft, step, tensors, fingerprint)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not disk_is_full(error):
            raise
        size, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(folder).free
        more = 1 if spare is None else 2
        raise OSError(
            errno.ENOSPC,
            f"no space left in {folder} for checkpoint {step} of {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
            f"older ones are whole. While one is written, keep_checkpoints + {more} = {keep + more} have to fit",
        ) from error
    _remove(target)
    draft.rename(target)
    _to_disk(folder)
    # Later steps than this are another run's; counting them would remove what was just written.
    for old in [path for path in _folders(folder) if path.name <= target.name][:-keep]:
        if spare is None or old != _folder_of(folder, spare):
            _remove(old)
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
            return manifest.step, _whole(candidate, manifest)
        except (OSError, ValueError) as problem:
            logger.warning("%s is damaged (%s); falling back to the one before", candidate, problem)
    return None


def load_checkpoint(folder: Path, step: int, fingerprint: str) -> dict[str, Tensor]:
    """The tensors of this run's checkpoint `step`; FileNotFoundError or ValueError where it is not there, or whole."""
    candidate = _folder_of(folder, step)
    manifest = read_json(candidate / "checkpoint.json", CheckpointManifest)
    if manifest.fingerprint != fingerprint:
        raise ValueError(f"{candidate} belongs to a run with other settings")
    return _whole(candidate, manifest)


def _whole(candidate: Path, manifest: CheckpointManifest) -> dict[str, Tensor]:
    if file_digest(candidate / "state.safetensors") != manifest.sha256:
        raise ValueError("the digest of state.safetensors differs from checkpoint.json")
    return load_file(candidate / "state.safetensors")  # type: ignore[no-any-return]


def _write(draft: Path, step: int, tensors: dict[str, Tensor], fingerprint: str) -> None:
    draft.mkdir()
    state, manifest = draft / "state.safetensors", draft / "checkpoint.json"
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, state)
    write_json(manifest, CheckpointManifest(step=step, fingerprint=fingerprint, sha256=file_digest(state)))
    for path in (state, manifest, draft):
        _to_disk(path)


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint if it exists, under a hidden name, so that no half of it is found."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
        checkpoint.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _folder_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []
