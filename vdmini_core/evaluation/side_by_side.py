"""Teacher and students generate the same clips, batch by batch and pair by pair; what each row's clips come to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdmini_core.artifacts import Estimate
from vdmini_core.data.latents import LatentCache
from vdmini_core.evaluation.evaluator import Evaluator, Judgement
from vdmini_core.evaluation.metrics.dynamics import DYNAMICS, dynamics
from vdmini_core.evaluation.metrics.manifold import NEAREST, precision_and_recall
from vdmini_core.evaluation.metrics.paired import Seen, bca, cosine_distance, paired, ratio_of_means, see
from vdmini_core.evaluation.metrics.perceptual import Distance, perceptual_distances, perceptual_measures
from vdmini_core.evaluation.metrics.pixels import pixel_measures
from vdmini_core.evaluation.quality import Judged, generated_batches, precision, verdict
from vdmini_core.models import Denoiser, Pipeline
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import EvaluateSettings

TEACHER = "teacher"
CORNERS = (TEACHER, "recovered")
"""Denoisers whose latents are decoded by the compressed decoder as well"""
RATIOS = tuple(f"{name}_ratio" for name in DYNAMICS)
PAIRED_MEASURES = (
    *("psnr", "ssim", "lpips", "dreamsim", "feature_cosine", "motion_cosine", "flow_error"),
    *RATIOS,
)
"""Measures of a student's clips beside the teacher's; all others are of the row's clips alone"""

Values = npt.NDArray[np.float64]


def with_decoder(name: str) -> str:
    """A row's name with the compressed decoder."""
    return f"{name}, compressed decoder"


@dataclass
class RowClips:
    """What is kept of N clips of one denoiser: verdicts, dynamics [N, 3], and measures [N] by name.

    `pairs` compare with the teacher's clips, `diversity` clips of the same condition from several seeds.
    """

    judged: Judged
    dynamics: Tensor
    pairs: dict[str, Tensor] = field(default_factory=dict)
    diversity: dict[str, Tensor] = field(default_factory=dict)

    def joined(self, more: "RowClips") -> "RowClips":
        """These clips and more of them."""
        pairs = {name: torch.cat([value, more.pairs[name]]) for name, value in self.pairs.items()}
        return RowClips(self.judged.joined(more.judged), torch.cat([self.dynamics, more.dynamics]), pairs)


def generate_rows(
    pipeline: Pipeline,
    denoisers: Mapping[str, Denoiser],
    data: LatentCache,
    evaluator: Evaluator,
    settings: EvaluateSettings,
    keep: Callable[[str, Tensor], None] = lambda name, clips: None,
    track: Track = silent_track,
    compressed: Pipeline | None = None,
) -> dict[str, RowClips]:
    """Generate and compare `settings.clips` clips of each denoiser; one batch of each is in memory at a time.

    All start from the same noise and conditions; one of them is TEACHER. `keep(name, clips)` receives every batch.
    `compressed` is the pipeline with another decoder: it decodes the same latents of the denoisers in CORNERS once
    more, which make rows of their own (`with_decoder`).
    """
    distances = perceptual_distances(settings.perceptual, pipeline.device)
    latents: dict[str, Tensor] = {}

    def noting(name: str) -> Callable[[Tensor], None]:
        return lambda sampled: latents.update({name: sampled})

    streams = [
        generated_batches(pipeline, denoiser, data, settings, sampled=noting(name))
        for name, denoiser in denoisers.items()
    ]
    found: dict[str, RowClips] = {}
    several: dict[str, list[Judgement]] = {name: [] for name in denoisers}
    wanted = min(settings.diversity, settings.clips)
    starts = range(0, settings.clips, settings.batch_size)
    for start, batches in zip(track(starts, "generate the rows", len(starts)), zip(*streams, strict=True), strict=True):
        seen: dict[str, Seen] = {}
        for name, (clips, _) in zip(denoisers, batches, strict=True):
            keep(name, clips)
            seen[name] = see(clips, evaluator)
            if start < wanted:
                several[name].append(seen[name].judgement)
        for name in (name for name in CORNERS if compressed and name in denoisers):
            assert compressed is not None
            with precision(compressed.device, settings):
                decoded = compressed.decode(latents[name])
            twice = see(decoded.float(), evaluator)  # judged as the other rows are
            judged = verdict(twice.judgement, batches[list(denoisers).index(name)][1])
            more = RowClips(judged, dynamics(twice.clips, twice.flows), _pairs(twice, seen[TEACHER], distances))
            row_name = with_decoder(name)
            found[row_name] = found[row_name].joined(more) if row_name in found else more
        for name, (clips, labels) in zip(denoisers, batches, strict=True):
            pairs = {} if name == TEACHER else _pairs(seen[name], seen[TEACHER], distances)
            row = RowClips(verdict(seen[name].judgement, labels), dynamics(clips, seen[name].flows), pairs)
            found[name] = found[name].joined(row) if name in found else row
    if wanted:
        for name, denoiser in track(list(denoisers.items()), "generate from further seeds", len(denoisers)):
            seeds = [_features(several[name], wanted)]
            for seed in range(settings.seed + 1, settings.seed + settings.diversity_seeds):
                again = settings.model_copy(update={"seed": seed, "clips": wanted})
                others = generated_batches(pipeline, denoiser, data, again)
                seeds.append(_features([evaluator(clips) for clips, _ in others], wanted))
            found[name].diversity = diversity(seeds)
    return found


def _pairs(student: Seen, teacher: Seen, distances: Mapping[str, Distance]) -> dict[str, Tensor]:
    damage = paired(student, teacher)
    return {
        **pixel_measures(student.clips, teacher.clips),
        **perceptual_measures(distances, student.clips, teacher.clips),
        "feature_cosine": 1 - damage["content"],
        "motion_cosine": 1 - damage["motion"],
        "flow_error": damage["flow_error"],
    }


def _features(judgements: list[Judgement], count: int) -> tuple[Tensor, Tensor]:
    """Of the first `count` clips: single frames' features [count, T, D], and the motion's [count, D]."""
    frames, motion = ([getattr(judgement, name) for judgement in judgements] for name in ("frames", "motion"))
    return torch.cat(frames)[:count], torch.cat(motion)[:count]


def diversity(seeds: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """1 - cosine of features of clips of one condition from two seeds, a mean over pairs of seeds, [prompts].

    For each seed features of frames [prompts, T, D], compared frame by frame, and of motion [prompts, D].
    """
    pairs = list(combinations(seeds, 2))
    content = torch.stack([cosine_distance(a[0], b[0]).mean(1) for a, b in pairs]).mean(0)
    motion = torch.stack([cosine_distance(a[1], b[1]) for a, b in pairs]).mean(0)
    return {"content_diversity": content.cpu(), "motion_diversity": motion.cpu()}


def estimates(row: RowClips, teacher: RowClips | None, reference: Judged, seed: int) -> dict[str, Estimate]:
    """Measure -> mean over prompts with its BCa interval. `teacher` is None for the teacher itself.

    Precision and recall are against the reference's features, and left out where there are too few clips. Ratios are
    of means, the student's to the teacher's.
    """
    samples: dict[str, Values] = {}
    if row.judged.right is not None:
        content, motion = row.judged.right.double().numpy().T
        samples |= {"content_accuracy": content, "motion_accuracy": motion}
    if min(len(reference), len(row.judged)) > NEAREST:
        for kind in ("content", "motion"):
            real, generated = (getattr(judged, kind).double().numpy() for judged in (reference, row.judged))
            precision, recall = precision_and_recall(real, generated)
            samples |= {f"{kind}_precision": precision, f"{kind}_recall": recall}
    measured = {**row.diversity, **row.pairs}
    samples |= {name: value.double().numpy() for name, value in measured.items() if len(value) > 1}
    found = {name: bca([values], seed=seed) for name, values in samples.items()}
    if teacher is not None:
        ours, theirs = (found_row.dynamics.double().numpy().T for found_row in (row, teacher))
        ratios = zip(RATIOS, zip(ours, theirs, strict=True), strict=True)
        found |= {name: bca(pair, ratio_of_means, seed) for name, pair in ratios}
    return found


def ratios(clips: Tensor, others: Tensor) -> dict[str, float]:
    """Means of DYNAMICS of clips [N, 3], as multiples of those of others [M, 3]."""
    a, b = (values.double().numpy() for values in (clips, others))
    return dict(zip(DYNAMICS, ratio_of_means(a, b, axis=0).tolist(), strict=True))
