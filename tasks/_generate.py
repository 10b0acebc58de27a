"""What `vdmini generate` does: find the model, make one clip from one image or caption."""

from pathlib import Path

import torch

from tasks._stage import quieten
from vdmini_core.artifacts import folder_digest
from vdmini_core.evaluation.compare import write_clip_to
from vdmini_core.models import load_pipeline, pipeline_class
from vdmini_core.models.generating import generate_clip, read_image
from vdmini_core.models.sources import resolve_source
from vdmini_core.settings import EncodeSettings


def model_folder(model: str) -> Path:
    """The pipeline folder behind `models:/...`, a pipeline folder, a stage's output, `teacher` or `zoo:...`."""
    if model.startswith("models:/"):
        from tasks._registry import DIGEST_TAG, model_tags, resolve_model

        folder, wanted = resolve_model(model), model_tags(model).get(DIGEST_TAG)
        if wanted is not None and folder_digest(folder) != wanted:
            raise ValueError(
                f"{folder} is no longer what {model} registered (its digest differs): a later run has replaced it; "
                "`dvc checkout` the commit of that version, or name the folder itself to use what is there"
            )
        return folder
    if model == "teacher":
        from vdmini_core.models.verify import teacher_folder

        return teacher_folder(Path("artifacts/teacher/teacher.json"))
    folder = resolve_source(model)
    nested = folder / "model"
    return nested if (nested / "model_index.json").is_file() else folder


def generate(
    model: str,
    image: Path | None,
    out: Path,
    *,
    prompt: str | None = None,
    frames: int | None,
    steps: int,
    seed: int,
    tile: int | None = None,
    chunk: int | None = None,
) -> None:
    """Write one mp4 that continues `image` or shows `prompt`; size and default length are the model's own."""
    quieten()
    folder = model_folder(model)
    match pipeline_class(folder).conditioned_on:
        case "image" if image is None or prompt is not None:
            raise ValueError(f"{model} is an image-to-video model: give --image, the first frame, and no --prompt")
        case "text" if prompt is None or image is not None:
            raise ValueError(f"{model} is a text-to-video model: give --prompt, what the clip shows, and no --image")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(folder, device=device)
    default_frames, height, width = pipeline.default_shape()
    first = torch.zeros(1, 3, height, width) if image is None else read_image(image, height, width)
    clip = generate_clip(
        pipeline,
        first,
        prompt or "",
        frames=frames or default_frames,
        steps=steps,
        seed=seed,
        told=EncodeSettings(),
        tile=tile,
        chunk=chunk,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_clip_to(out, clip)
