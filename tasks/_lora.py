"""What `vdmini lora` does: a teacher's LoRA becomes the student's."""

from pathlib import Path

from tasks._generate import model_folder
from vdmini_core.artifacts import Plan, read_json
from vdmini_core.models.lora import map_lora_file
from vdmini_core.models.published import blueprint


def convert(lora: Path, out: Path, plan: Path, teacher: str) -> tuple[int, list[str]]:
    """Write `out` for the student of the plan; how many weights it keeps, and which it lacks."""
    graph = blueprint(str(model_folder(teacher))).build()
    return map_lora_file(lora, out, graph, read_json(plan, Plan).removed)
