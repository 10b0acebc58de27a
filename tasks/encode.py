"""Stage encode: latents and conditions of the clips, computed once with the teacher's own encoders."""

from tasks._stage import Context
from vdmini_core.artifacts import DataManifest, TeacherManifest, read_json
from vdmini_core.models import load_pipeline
from vdmini_core.models.encoding import encode_dataset
from vdmini_core.models.verify import teacher_folder


def run(context: Context) -> None:
    data = read_json(context.input("data") / "manifest.json", DataManifest)
    teacher = read_json(context.input("teacher") / "teacher.json", TeacherManifest)
    folder = teacher_folder(context.input("teacher") / "teacher.json")
    pipeline = load_pipeline(folder, ("vae", "conditioner"), context.device)
    provenance = context.provenance(data=data.digest, teacher=teacher.digest)
    settings = context.params.encode
    manifest = encode_dataset(pipeline, data, settings, context.folder, teacher.digest, provenance, context.track)
    context.log({f"data/{split}_clips": count for split, count in manifest.counts.items()}, 0)
