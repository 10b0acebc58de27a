"""Finds a teacher's folder: the zoo's, a local one, or a hub snapshot at a pinned revision."""

import re
from pathlib import Path

from vdmini_core.models.loading import UnusableModel

ZOO = Path(__file__).parent.parent / "zoo" / "weights"
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
HUB_FILES = ("*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")


def resolve_source(source: str, revision: str | None = None) -> Path:
    """The folder behind `zoo:<name>`, a path, or a hub id `owner/name` (whose revision must be given)."""
    if source.startswith("zoo:"):
        name = source.removeprefix("zoo:")
        names = sorted(path.name for path in ZOO.iterdir() if (path / "model_index.json").is_file())
        if name not in names:
            raise UnusableModel(f"teacher.source {source!r}: the zoo has {', '.join(f'zoo:{n}' for n in names)}")
        return ZOO / name
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if not HUB_ID.match(source) or source.startswith((".", "/")):
        raise UnusableModel(f"teacher.source {source!r} is no folder, no zoo name and no hub id (owner/name)")
    if revision is None:
        raise UnusableModel(
            f"teacher.source {source!r} is no folder here; to fetch it from the hub set teacher.revision to a commit"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UnusableModel(f"{source} at {revision} cannot be fetched from the hub: {error}") from error


def evaluator_folder() -> Path:
    """The folder of the offline evaluator that ships with the project."""
    return ZOO / "evaluator"
