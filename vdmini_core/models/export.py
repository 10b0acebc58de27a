"""Writes the compressed pipeline as a folder that diffusers loads."""

import json
import shutil
from pathlib import Path

from vdmini_core.models import pipeline_class


def export_pipeline(teacher: Path, denoiser: Path, target: Path) -> Path:
    """Copy the teacher's pipeline folder with `denoiser` in place of its own; whole or absent.

    Where the student's class is not diffusers' own, model_index.json names the module it comes from,
    which diffusers imports.
    """
    draft = target.with_name(f".{target.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    part = pipeline_class(teacher).denoiser_folder()
    shutil.copytree(teacher, draft, ignore=shutil.ignore_patterns(part, "manifest.json", ".*"))
    shutil.copytree(denoiser, draft / part)
    index = json.loads((draft / "model_index.json").read_text())
    name = json.loads((denoiser / "config.json").read_text())["_class_name"]
    index[part] = ["vdmini_core.models.unet" if name.startswith("VDMini") else "diffusers", name]
    (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return target
