"""Stage prune: the plan's units leave the teacher's network; the rest keeps its weights."""

import torch

from tasks._inputs import teacher_manifest, teacher_pipeline
from tasks._stage import Context
from vdmini_core.artifacts import Plan, read_json
from vdmini_core.pruning.surgery import prune


def run(context: Context) -> None:
    plan = read_json(context.input("plan") / "plan.json", Plan)
    dtype = getattr(torch, context.params.prune.dtype)
    student = prune(
        teacher_pipeline(context, "denoiser").denoiser, teacher_manifest(context), plan, context.folder, dtype
    )
    count = sum(p.numel() for p in student.model.parameters())
    context.log({"size/unet_parameters": count, "size/unet_parameter_ratio": count / plan.teacher_parameters}, 0)
