"""Stage teacher: find the model to compress and make sure that it is whole."""

from tasks._stage import Context
from vdmini_core.artifacts import write_json
from vdmini_core.models.verify import verify_teacher


def run(context: Context) -> None:
    settings = context.params.teacher
    manifest = verify_teacher(settings.source, settings.revision)
    write_json(context.folder / "teacher.json", manifest)
    context.log({f"size/{part}_parameters": count for part, count in manifest.parameters.items()}, 0)
    context.tracker.tags({"vdmini.teacher": manifest.source, "vdmini.teacher_digest": manifest.digest})
