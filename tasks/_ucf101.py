"""What `vdmini fvd`, `vdmini is` and `vdmini ucf101` do: clips of files, an extractor, a number with its protocol."""

from dataclasses import dataclass
from pathlib import Path

import torch

from tasks._generate import model_folder
from tasks._stage import SCRATCH, progress, provenance, quieten
from vdmini_core.artifacts import folder_digest, json_digest
from vdmini_core.evaluation.extractor import Extractor, load_extractor
from vdmini_core.evaluation.generation import GenerationManifest, Made, generate_videos, shard_of
from vdmini_core.evaluation.protocol import Sampling
from vdmini_core.evaluation.ucf101 import (
    FVDResult,
    InceptionResult,
    Part,
    Videos,
    conditioned_orders,
    fvd_result,
    generated_videos,
    inception_result,
    real_videos,
    video_protocol,
)
from vdmini_core.evaluation.video_features import ClipSpec, VideoFeatures, extract_features
from vdmini_core.models import load_pipeline


@dataclass(frozen=True)
class Extraction:
    """Which extractor, how it is fed, and where weights and features are kept."""

    source: str
    sha256: str
    spec: ClipSpec
    workers: int = 2
    batch_size: int = 8
    cache: Path = SCRATCH / "features"

    def load(self) -> Extractor:
        return load_extractor(self.source, self.sha256, self.cache / "weights", _device())

    def features(self, extractor: Extractor, videos: Videos, count: int) -> VideoFeatures:
        return extract_features(
            videos.root,
            videos.names[:count],
            extractor,
            self.spec,
            self.cache,
            workers=self.workers,
            batch_size=self.batch_size,
            track=progress,
        )


def fvd(
    real: Path, generated: Path, extraction: Extraction, split: int, part: Part, count: int, ddof: int
) -> FVDResult:
    """FVD of `count` clips a side, with as many real ones again for the floor."""
    extractor = extraction.load()
    ours, theirs = real_videos(real, split, part), generated_videos(generated)
    protocol = video_protocol("FVD", extractor, extraction.spec, ours, theirs, ddof)
    return fvd_result(
        extraction.features(extractor, ours, 2 * count),
        extraction.features(extractor, theirs, count),
        count,
        ddof,
        protocol,
        provenance({"clips": count}, extractor.device, {"real": _listing(ours), "generated": _listing(theirs)}),
    )


def inception(generated: Path, extraction: Extraction, count: int, splits: int) -> InceptionResult:
    """Inception score of `count` generated clips."""
    extractor = extraction.load()
    videos = generated_videos(generated)
    protocol = video_protocol(f"inception score of {splits} splits", extractor, extraction.spec, None, videos, None)
    features = extraction.features(extractor, videos, count)
    made_of = {"generated": _listing(videos)}
    return inception_result(features, count, splits, protocol, provenance({"clips": count}, extractor.device, made_of))


def generate(
    data: Path,
    model: str,
    out: Path,
    *,
    split: int,
    part: Part,
    count: int | None,
    steps: int,
    fps: int,
    crf: int,
    seed: int,
    shard: str,
) -> tuple[Made, int]:
    """Make a video for each listed real one, from its first frame or its class; what was made, of how many."""
    quieten()
    orders = conditioned_orders(data, split, part, count, seed)
    folder = model_folder(model)
    pipeline = load_pipeline(folder, device=_device())
    frames, height, width = pipeline.default_shape()
    manifest = GenerationManifest(
        model=folder_digest(folder),
        conditioned_on=pipeline.conditioned_on,
        sampling=Sampling(
            sampler="the model's own scheduler and noise levels",
            steps=steps,
            guidance="no classifier-free guidance",
            precision="fp32",
            seeds=(seed,),
            prompts_sha256=json_digest([[order.name, order.prompt] for order in orders]),
        ),
        frames=frames,
        height=height,
        width=width,
        fps=fps,
        codec="libx264",
        crf=crf,
    )
    mine = shard_of(orders, shard)
    return generate_videos(pipeline, mine, out, manifest, progress), len(mine)


def _listing(videos: Videos) -> str:
    return json_digest(list(videos.names))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
