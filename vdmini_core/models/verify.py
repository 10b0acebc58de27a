"""Verifies a teacher's folder part by part, and records what it is; weights are referenced, not copied."""

from pathlib import Path

from vdmini_core.artifacts import TeacherManifest, file_digest, json_digest, read_json
from vdmini_core.models import pipeline_class, pipeline_name
from vdmini_core.models.loading import UnusableModel, check_weights
from vdmini_core.models.sources import resolve_source


def verify_teacher(source: str, revision: str | None) -> TeacherManifest:
    """Load every part, refusing missing files, damaged weights and keys that do not fit."""
    folder = resolve_source(source, revision)
    cls = pipeline_class(folder)
    parts = [name for names in cls.folders.values() for name in names]
    for part in parts:
        check_weights(folder / part)
    for file in cls.files:
        if not (folder / file).is_file():
            raise UnusableModel(f"{folder / file} is missing; copy the whole pipeline folder")
    pipeline = cls.load(folder)
    files = sorted(path for part in parts for path in (folder / part).glob("*.safetensors"))
    digests = {str(path.relative_to(folder)): file_digest(path) for path in files}
    return TeacherManifest(
        source=source,
        revision=revision,
        pipeline=pipeline_name(folder),
        parameters=pipeline.parameter_counts(),
        digests=digests,
        digest=json_digest(digests),
        blocks=pipeline.denoiser.blocks,
    )


def teacher_folder(manifest_file: Path) -> Path:
    """The folder of a verified teacher, if it is still there and its weights are the same."""
    manifest = read_json(manifest_file, TeacherManifest)
    folder = resolve_source(manifest.source, manifest.revision)
    for name, digest in manifest.digests.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise UnusableModel(f"{folder / name} is gone or has changed since stage teacher; run it again")
    return folder
