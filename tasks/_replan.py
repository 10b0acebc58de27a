"""What `vdmini plan` answers: another plan from the finished sensitivity report; nothing is measured or written."""

from typing import Any

import torch
from pydantic import ValidationError

from tasks._stage import ARTIFACTS, provenance, quieten
from vdmini_core.artifacts import Plan, SensitivityReport, TeacherManifest, file_digest, read_json
from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.models.published import blueprint
from vdmini_core.models.sources import resolve_source
from vdmini_core.pruning.planning import evidence_of, make_plan
from vdmini_core.settings import PlanSettings, describe


def replan(settings: PlanSettings, changes: dict[str, Any]) -> Plan:
    """The plan that these settings give after the changes; ValueError where they or the budget cannot be."""
    quieten()
    try:
        asked = PlanSettings.model_validate(settings.model_dump() | changes)
    except ValidationError as error:
        raise ValueError(f"plan: {describe(error)}") from None
    file = ARTIFACTS / "sensitivity" / "report.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; `vdmini run --target sensitivity` writes it")
    teacher = read_json(ARTIFACTS / "teacher" / "teacher.json", TeacherManifest)
    rows, digest = LatentCache(ARTIFACTS / "encode", "test").rows([0]), file_digest(file)
    return make_plan(
        blueprint(str(resolve_source(teacher.source, teacher.revision))).build(),
        asked,
        rows["latents"],
        condition_of(rows),
        evidence_of(read_json(file, SensitivityReport)),
        report_digest=digest,
        teacher_digest=teacher.digest,
        provenance=provenance(
            asked.model_dump(mode="json"), torch.device("cpu"), {"sensitivity": digest, "teacher": teacher.digest}
        ),
    )
