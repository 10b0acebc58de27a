"""Generates clips on fixed seeds and judges them: content and motion, apart."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from vdmini_core.artifacts import Quality
from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.evaluation.evaluator import Evaluator, Judgement, accuracies
from vdmini_core.evaluation.metrics.frechet import frechet_distance
from vdmini_core.models import Denoiser, Pipeline
from vdmini_core.models.pipeline import Answering
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import SamplerSettings

SMALLEST = 1e-6  # of what is divided by


@dataclass(frozen=True)
class Judged:
    """The evaluator's features and verdicts of N clips; `right` columns are content and motion.

    `right` is None where the clips carry no labels.
    """

    content: Tensor
    motion: Tensor
    right: Tensor | None

    def __len__(self) -> int:
        return len(self.content)

    def first(self, count: int) -> "Judged":
        """The first `count` clips."""
        right = None if self.right is None else self.right[:count]
        return Judged(self.content[:count], self.motion[:count], right)

    def joined(self, more: "Judged") -> "Judged":
        """These clips and more of them."""
        right = None if self.right is None or more.right is None else torch.cat([self.right, more.right])
        return Judged(torch.cat([self.content, more.content]), torch.cat([self.motion, more.motion]), right)


@torch.no_grad()
def judge(batches: Iterator[tuple[Tensor, Tensor]], evaluator: Evaluator) -> Judged:
    """Judge (clips [B, 3, T, H, W], labels [B, 3], -1 where unknown) batch by batch."""
    return reduce(Judged.joined, (verdict(evaluator(clips), labels) for clips, labels in batches))


def verdict(judgement: Judgement, labels: Tensor) -> Judged:
    """One batch, with labels [B, 3], -1 where unknown."""
    content, motion = judgement.content, judgement.motion
    right = torch.stack(accuracies(judgement, labels.to(content.device)), 1).cpu() if (labels >= 0).all() else None
    return Judged(content.cpu(), motion.cpu(), right)


def compare(generated: Judged, reference: Judged) -> Quality:
    """Accuracies of the generated clips and their toy Frechet distances to the reference (ddof 0)."""
    accuracy = None if generated.right is None else generated.right.float().mean(0).tolist()
    return Quality(
        clips=len(generated),
        content_accuracy=None if accuracy is None else accuracy[0],
        motion_accuracy=None if accuracy is None else accuracy[1],
        content_distance=frechet_distance(generated.content.numpy(), reference.content.numpy()),
        motion_distance=frechet_distance(generated.motion.numpy(), reference.motion.numpy()),
    )


def score(student: Quality, teacher: Quality) -> float:
    """One number to choose weights by, higher is better: the mean of content and motion accuracy.

    Where clips carry no labels, minus the mean of both Frechet distances, each as a multiple of the teacher's.
    """
    if student.content_accuracy is not None and student.motion_accuracy is not None:
        return (student.content_accuracy + student.motion_accuracy) / 2
    content = student.content_distance / max(teacher.content_distance, SMALLEST)
    return -(content + student.motion_distance / max(teacher.motion_distance, SMALLEST)) / 2


def quality_of(
    pipeline: Pipeline,
    denoiser: Denoiser,
    data: LatentCache,
    evaluator: Evaluator,
    settings: SamplerSettings,
    track: Track = silent_track,
) -> Quality:
    """What a denoiser makes of the first `settings.clips` conditions, against these clips as the VAE shows them."""
    reference = judge(decoded_batches(pipeline, data, settings.clips, settings), evaluator)
    return compare(judge(generated_batches(pipeline, denoiser, data, settings, track), evaluator), reference)


def decoded_batches(
    pipeline: Pipeline, data: LatentCache, count: int, settings: SamplerSettings, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Real clips as the VAE shows them, so that real and generated differ by the denoiser alone."""
    device = pipeline.device
    for rows in data.batches(count, settings.batch_size, first):
        with precision(device, settings):
            clips = pipeline.decode(rows["latents"].to(device))
        yield clips, rows["labels"]


def generated_batches(
    pipeline: Pipeline,
    denoiser: Denoiser,
    data: LatentCache,
    settings: SamplerSettings,
    track: Track = silent_track,
    description: str = "generate",
    keep: Callable[[Tensor], None] | None = None,
    first: int = 0,
    noise_from: int = 0,
    sampled: Callable[[Tensor], None] = lambda latents: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate from `settings.clips` conditions; the i-th of them starts from noise of (seed, noise_from + i).

    They are the encoded clips from `first` on. `keep(clips)` receives every decoded batch, `sampled(latents)` what it
    is decoded from.
    """
    batches = list(range(0, settings.clips, settings.batch_size))
    rows_of = data.batches(settings.clips, settings.batch_size, first)
    for start, rows in zip(track(batches, description, len(batches)), rows_of, strict=True):
        clips = generate(pipeline, denoiser, rows, noise_from + start, settings, sampled)
        if keep is not None:
            keep(clips)
        yield clips, rows["labels"]


def generate(
    pipeline: Pipeline,
    denoiser: Answering,
    rows: dict[str, Tensor],
    start: int,
    settings: SamplerSettings,
    sampled: Callable[[Tensor], None] = lambda latents: None,
) -> Tensor:
    """Clips [B, 3, T, H, W] in [-1, 1] from the conditions of `rows`, the i-th from the noise of (seed, start + i).

    `sampled` receives the latents that are decoded.
    """
    device, latents = pipeline.device, rows["latents"]
    noise = partial(noise_for, settings.seed, range(start, start + len(latents)), latents.shape[1:], device)
    with precision(device, settings):
        latents = pipeline.sample(denoiser, noise, condition_of(rows, device), settings.steps)
        sampled(latents)
        return pipeline.decode(latents)


def precision(device: torch.device, settings: SamplerSettings) -> torch.autocast:
    """Of the networks within; what the sampler itself computes stays in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def noise_for(seed: int, clips: range, shape: torch.Size, device: torch.device | str, draw: int = 0) -> Tensor:
    """Standard normal noise [B, ...]; each clip's depends on (seed, its index, draw) alone, not on the batch."""
    generators = (torch.Generator().manual_seed(seed * 1_000_003 + clip + draw * 1_000_000_007) for clip in clips)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
