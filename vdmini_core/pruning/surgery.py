"""Physical removal: a plan becomes a smaller network on disk that reloads with every key in place."""

import copy
import shutil
from pathlib import Path

import torch

from vdmini_core.artifacts import Plan, TeacherManifest
from vdmini_core.models import Denoiser, IllegalPlan, load_denoiser
from vdmini_core.models.decoder import VAEDecoder


def check_plan(denoiser: Denoiser, teacher: TeacherManifest, plan: Plan) -> None:
    """Raise IllegalPlan unless the plan was made for this teacher and accounts for every unit once."""
    if plan.teacher_digest != teacher.digest:
        raise IllegalPlan("the plan was made for another teacher (its digest differs); run stage plan again")
    names = [unit.name for unit in denoiser.units]
    if sorted(plan.removed + plan.kept) != sorted(names):
        odd = sorted(set(plan.removed + plan.kept) ^ set(names)) or sorted(set(plan.removed) & set(plan.kept))
        raise IllegalPlan(
            f"the plan's removed and kept units are not the teacher's units, each once: see {', '.join(odd)}"
        )


def prune(denoiser: Denoiser, teacher: TeacherManifest, plan: Plan, folder: Path, dtype: torch.dtype) -> Denoiser:
    """Build the student, save it as `folder/denoiser` and return it as reloaded from there."""
    check_plan(denoiser, teacher, plan)
    student = denoiser.without(plan.removed)
    save_model(student, folder / "denoiser", dtype)
    return load_denoiser(folder / "denoiser")


def save_model(denoiser: Denoiser | VAEDecoder, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save the model (of a decoder the whole VAE) so that it is there whole or not at all; it stays as it is."""
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        copy.deepcopy(denoiser.model).to(dtype).save_pretrained(draft, safe_serialization=True)
    except Exception:  # most likely a full disk
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
