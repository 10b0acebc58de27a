"""Writes the compressed pipeline as a folder that diffusers loads."""

import json
import shutil
from pathlib import Path


def export_pipeline(teacher: Path, unet: Path, target: Path) -> Path:
    """Copy the teacher's pipeline folder with `unet` in place of its own; whole or absent.

    Where the student's class is not diffusers' own, model_index.json names the module it comes from,
    which diffusers imports.
    """
    draft = target.with_name(f".{target.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(teacher, draft, ignore=shutil.ignore_patterns("unet", "manifest.json", ".*"))
    shutil.copytree(unet, draft / "unet")
    index = json.loads((draft / "model_index.json").read_text())
    name = json.loads((unet / "config.json").read_text())["_class_name"]
    index["unet"] = ["vdmini_core.models.svd" if name == "VDMiniUNet" else "diffusers", name]
    (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return target
