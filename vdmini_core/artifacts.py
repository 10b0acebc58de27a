"""What passes between stages: frozen JSON records, digests, and writes that are whole or absent."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """Base of every file between stages: frozen, and unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


R = TypeVar("R", bound=Record)


def read_json(path: Path, kind: type[R]) -> R:
    """Read a record, or raise ValueError naming the file and the offending key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the stage that writes it first")
    try:
        return kind.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ValueError(f"{path} is not a valid {kind.__name__}: {describe(error)}") from None


def write_json(path: Path, record: BaseModel | dict[str, Any]) -> None:
    """Write under a temporary name and rename, so that a reader sees all or nothing."""
    value = record.model_dump(mode="json") if isinstance(record, BaseModel) else record
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(draft, path)


def describe(error: ValidationError) -> str:
    """Turn pydantic's report into one line: key, what was expected, what was found."""
    parts = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r}")
        elif problem["type"] == "missing":
            parts.append(f"missing key {key!r}")
        else:
            parts.append(f"{key}: {problem['msg']}, got {problem['input']!r}")
    return "; ".join(parts)


def file_digest(path: Path) -> str:
    """sha256 of one file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_digest(value: BaseModel | dict[str, Any] | list[Any]) -> str:
    """sha256 of a JSON value in canonical form, hexadecimal."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path, pattern: str = "**/*") -> str:
    """sha256 over the relative names and digests of a folder's files, in name order."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    return json_digest([[str(path.relative_to(folder)), file_digest(path)] for path in files])
