"""What several stages read alike."""

from collections.abc import Iterable
from pathlib import Path

import vdmini_core
from tasks._stage import Context
from vdmini_core.artifacts import TeacherManifest, folder_digest, json_digest, read_json
from vdmini_core.data.latents import LatentCache
from vdmini_core.evaluation.evaluator import Evaluator, load_evaluator
from vdmini_core.evaluation.protocol import sampling_protocol
from vdmini_core.models import Pipeline, load_pipeline
from vdmini_core.models.sources import evaluator_folder
from vdmini_core.models.verify import teacher_folder
from vdmini_core.settings import Params, SamplerSettings


def teacher_manifest(context: Context) -> TeacherManifest:
    return read_json(context.input("teacher") / "teacher.json", TeacherManifest)


def teacher_pipeline(context: Context, *roles: str) -> Pipeline:
    """The teacher's named roles, its weights checked against the digests of stage teacher."""
    folder = teacher_folder(context.input("teacher") / "teacher.json")
    return load_pipeline(folder, roles, context.device)


def evaluator(context: Context) -> Evaluator:
    return load_evaluator(evaluator_folder(), context.device)


def test_clips(context: Context) -> LatentCache:
    """The encoded test clips; ValueError where validation wants some that another stage uses as well."""
    clips = LatentCache(context.input("encode"), "test")
    check_validation_clips(context.params, len(clips))
    return clips


def check_validation_clips(params: Params, encoded: int) -> None:
    """Validation takes the last test clips; evaluate the first, with as many more for its floor."""
    wanted = params.distill.validation.clips if params.distill.validation.every else 0
    used = max(2 * params.evaluate.clips, params.evaluate.gallery)
    if wanted and encoded < used + wanted:
        raise ValueError(
            f"distill.validation wants {wanted} test clips of its own, but of the {encoded} that are encoded "
            f"evaluate uses the first {min(used, encoded)}; set encode.test_clips to {used + wanted} "
            "(the data must have as many), lower evaluate.clips, or set distill.validation.every to 0"
        )


def code_digest(packages: Iterable[str]) -> str:
    """Of the source of packages of the library."""
    library = Path(vdmini_core.__path__[0])
    return json_digest({name: folder_digest(library / name, "**/*.py") for name in packages})


def train_clips(context: Context) -> LatentCache:
    return LatentCache(context.input("encode"), "train")


def protocol(context: Context, settings: SamplerSettings) -> dict[str, object]:
    """How clips are generated and judged; results of different protocols are not compared."""
    return sampling_protocol(settings, context.params.data, context.params.encode, evaluator_folder())
