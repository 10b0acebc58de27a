"""Writes the compressed pipeline as a folder that diffusers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

from vdmini_core.models import IllegalPlan, decoder, load_denoiser, pipeline_class, unet

MODULES = {cls.__name__: cls.__module__ for cls in (*unet.STUDENTS.values(), *decoder.STUDENTS.values())}
"""Classes of ours -> the module that they come from"""


def export_pipeline(
    teacher: Path, denoiser: Path, target: Path, *, vae: Path | None = None, stock: bool = False
) -> Path:
    """Copy the teacher's pipeline folder with `denoiser`, and `vae` if given, in place of its own; whole or absent.

    Where a class is not diffusers' own, model_index.json names the module it comes from, which diffusers imports.
    `stock` writes the denoiser's function as a class of diffusers' own, a missing mid block as one that does nothing;
    IllegalPlan where that class cannot say what is left.
    """
    draft = target.with_name(f".{target.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    part = pipeline_class(teacher).denoiser_folder()
    network = _stock_form(denoiser) if stock else None
    replaced = {part: denoiser} if vae is None else {part: denoiser, "vae": vae}
    shutil.copytree(teacher, draft, ignore=shutil.ignore_patterns(*replaced, "manifest.json", ".*"))
    index = json.loads((draft / "model_index.json").read_text())
    for name, folder in replaced.items():
        if name == part and network is not None:
            network.save_pretrained(draft / name, safe_serialization=True)
        else:
            shutil.copytree(folder, draft / name)
        kind = json.loads((draft / name / "config.json").read_text())["_class_name"]
        index[name] = [MODULES.get(kind, "diffusers"), kind]
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
