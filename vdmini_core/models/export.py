"""Writes the compressed pipeline as a folder that diffusers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

from vdmini_core.models import IllegalPlan, load_denoiser, pipeline_class


def export_pipeline(teacher: Path, denoiser: Path, target: Path, *, stock: bool = False) -> Path:
    """Copy the teacher's pipeline folder with `denoiser` in place of its own; whole or absent.

    Where the student's class is not diffusers' own, model_index.json names the module it comes from, which
    diffusers imports. `stock` writes the same function as a class of diffusers' own, a missing mid block as
    one that does nothing; IllegalPlan where that class cannot say what is left.
    """
    draft = target.with_name(f".{target.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    part = pipeline_class(teacher).denoiser_folder()
    network = _stock_form(denoiser) if stock else None
    shutil.copytree(teacher, draft, ignore=shutil.ignore_patterns(part, "manifest.json", ".*"))
    if network is None:
        shutil.copytree(denoiser, draft / part)
    else:
        network.save_pretrained(draft / part, safe_serialization=True)
    index = json.loads((draft / "model_index.json").read_text())
    name = json.loads((draft / part / "config.json").read_text())["_class_name"]
    index[part] = ["vdmini_core.models.unet" if name.startswith("VDMini") else "diffusers", name]
    (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return target


def _stock_form(folder: Path) -> Any:
    """The network in `folder` as a model of diffusers' own class, in float32."""
    student = load_denoiser(folder)
    model = student.stock_form()
    if model is None:
        cls = type(student.model)
        raise IllegalPlan(
            f"{folder} is a {cls.__name__}, and no config of {cls.__mro__[1].__name__} says what is left of it; set "
            "register.mid to none, or change the plan so that every stage keeps equally many pairs"
        )
    return model
