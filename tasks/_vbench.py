"""What `vdmini vbench generate` and `vdmini vbench run` do: make the videos, then have them judged."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tasks._generate import model_folder
from tasks._stage import progress, provenance, quieten
from vdmini_core.artifacts import folder_digest, read_json, write_json
from vdmini_core.evaluation.generation import (
    MANIFEST,
    GenerationManifest,
    generate_videos,
    shard_of,
)
from vdmini_core.evaluation.protocol import Protocol, Sampling
from vdmini_core.evaluation.vbench.flicker import temporal_flickering
from vdmini_core.evaluation.vbench.official import Official, evaluate
from vdmini_core.evaluation.vbench.report import VBenchReport, vbench_report
from vdmini_core.evaluation.vbench.suite import (
    FULL_INFO,
    IMAGES,
    Suite,
    check_layout,
    layout_text,
    orders_of,
    read_suite,
)
from vdmini_core.models import load_pipeline, pipeline_class


@dataclass(frozen=True)
class Request:
    """What is asked for, of which prompts, and where it goes."""

    suite: str
    checkout: Path
    out: Path
    dimensions: tuple[str, ...] = ()
    per_dimension: int | None = None
    ratio: str = "16-9"
    seed: int = 0

    def whole(self) -> Suite:
        return read_suite(self.suite, self.checkout / FULL_INFO[self.suite])

    def chosen(self) -> Suite:
        suite = self.whole()
        suite = suite.only(self.dimensions) if self.dimensions else suite
        return suite.subset(self.per_dimension) if self.per_dimension else suite


@dataclass(frozen=True)
class Making:
    """How videos are made; None is the model's own."""

    model: str
    steps: int
    frames: int | None = None
    fps: int = 8
    crf: int = 16


def missing(request: Request) -> int:
    """How many videos are not there yet; FileNotFoundError where the checkout is not what it should be."""
    return len(check_layout(request.out / "videos", request.chosen(), request.whole()).missing)


def words_of(request: Request, making: Making) -> list[str]:
    """The words of `vdmini` that make the same videos elsewhere, but for the model and the folder."""
    words = ["vbench", "generate", "--suite", request.suite, "--checkout", str(request.checkout)]
    words += [word for name in request.dimensions for word in ("--dimension", name)]
    numbers = {"--per-dimension": request.per_dimension, "--steps": making.steps, "--frames": making.frames}
    numbers |= {"--fps": making.fps, "--crf": making.crf, "--seed": request.seed}
    words += [word for name, value in numbers.items() if value is not None for word in (name, str(value))]
    return [*words, "--ratio", request.ratio]


def generate(request: Request, making: Making, shard: str = "0/1") -> tuple[int, int]:
    """Make the shard's videos that are not there yet; how many were made, and how many the shard has."""
    quieten()
    suite = request.chosen()
    images = request.checkout / IMAGES / request.ratio if request.suite == "i2v" else None
    orders = shard_of(orders_of(suite, request.seed, images), shard)
    folder = model_folder(making.model)
    wanted = "image" if request.suite == "i2v" else "text"
    if pipeline_class(folder).conditioned_on != wanted:
        raise ValueError(f"VBench {request.suite} gives a model {wanted}s, which {making.model} does not take")
    pipeline = load_pipeline(folder, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    frames, height, width = pipeline.default_shape()
    manifest = GenerationManifest(
        model=folder_digest(folder),
        conditioned_on=pipeline.conditioned_on,
        sampling=Sampling(
            sampler="the model's own scheduler and noise levels",
            steps=making.steps,
            guidance="no classifier-free guidance",
            precision="fp32",
            seeds=(request.seed,),
            prompts_sha256=request.whole().digest(),
        ),
        frames=making.frames or frames,
        height=height,
        width=width,
        fps=making.fps,
        codec="libx264",
        crf=making.crf,
    )
    return generate_videos(pipeline, orders, request.out, manifest, progress).count, len(orders)


def run(request: Request, official: Official, making: Making | None) -> VBenchReport:
    """Make what is missing if a model is given, and have the videos judged; the report is in `out`/report.json."""
    # Without a handler SIGTERM would leave the official process running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    official.check(request.suite)
    if making is not None:
        generate(request, making)
    suite, videos = request.chosen(), request.out / "videos"
    layout = check_layout(videos, suite, request.whole())
    if not layout.complete:
        raise ValueError(f"{layout_text(layout, videos)}; `vdmini vbench generate` makes what is missing")
    attempts = evaluate(official, suite, videos, request.out / "official", progress)
    flickering = None
    if "temporal_flickering" in suite.dimensions():
        names = suite.videos("temporal_flickering")
        flickering = temporal_flickering(progress([videos / name for name in names], "flickering", len(names)))
    protocol = protocol_of(request, suite, official)
    report = vbench_report(
        suite,
        attempts,
        flickering,
        protocol.model_dump(mode="json"),
        protocol.digest(),
        provenance({"dimensions": suite.dimensions()}, torch.device("cpu"), {"videos": _made_by(request.out)}),
    )
    write_json(request.out / "report.json", report)
    return report


def protocol_of(request: Request, suite: Suite, official: Official) -> Protocol:
    """How the report's numbers were made; videos that came from elsewhere say nothing of their sampling."""
    path = request.out / MANIFEST
    made = read_json(path, GenerationManifest) if path.is_file() else None
    return Protocol(
        measure=f"VBench {request.suite}",
        extractor=f"official code at {official.commit()}",
        extractor_sha256=None,
        reference=None,
        clips=len(suite.videos()),
        frames=made and made.frames,
        fps=made and made.fps,
        size=(made.height, made.width) if made else None,
        resize="by the official code",
        crop="by the official code",
        ddof=None,
        codec=made.codec if made else "not recorded",
        crf=made and made.crf,
        sampling=made and made.sampling,
        details={
            "prompts_sha256": suite.digest(),
            "prompts_per_dimension": suite.per_dimension or "all",
            "ratio": official.ratio if request.suite == "i2v" else None,
            "static_filter": "not applied to temporal_flickering",
        },
    )


def _made_by(out: Path) -> str:
    path = out / MANIFEST
    return read_json(path, GenerationManifest).model if path.is_file() else "not recorded"
