"""Where the time of one clip goes: encoder, all calls of the denoiser, VAE decoding, and the whole; all in one run."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vdmini_core.artifacts import Latency
from vdmini_core.evaluation.costs import latency_of, synchronise
from vdmini_core.models import Condition, Denoiser, Pipeline
from vdmini_core.models.vae_facts import LatentShape
from vdmini_core.settings import EncodeSettings

PARTS = ("encoder", "denoiser", "vae_decode")
WHOLE = "end_to_end"
STAGES = (*PARTS, WHOLE)
CAPTION = "a red circle moves to the left"


@dataclass(frozen=True)
class OneClip:
    """What one clip is made from: first frame [1, 3, H, W] in [-1, 1] or caption, and noise [1, C, T', h, w]."""

    pipeline: Pipeline
    image: Tensor
    noise: Tensor
    steps: int

    @classmethod
    def of_latents(cls, pipeline: Pipeline, shape: LatentShape, steps: int, seed: int = 0) -> "OneClip":
        """A clip of such latents, from random numbers, which take no other time than real ones."""
        height, width = (side * pipeline.vae_facts.spatial for side in shape[2:])
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand(1, 3, height, width, generator=generator) * 2 - 1
        return cls(pipeline, image, torch.randn(1, *shape, generator=generator).to(pipeline.device), steps)

    def condition(self) -> Condition:
        """The encoders' part; text encoders pad, so that any caption takes as long as any other."""
        return self.pipeline.condition(self.image, [CAPTION], EncodeSettings(), torch.Generator().manual_seed(0))

    def sample(self, denoiser: Denoiser, condition: Condition) -> Tensor:
        """Latents, with the same noise at every step."""
        return self.pipeline.sample(denoiser, lambda index: self.noise, condition, self.steps)

    def timed(self, denoiser: Denoiser, decoding: Pipeline | None = None) -> dict[str, float]:
        """Make the clip; milliseconds by the names of STAGES, on the device's own clock on CUDA.

        `decoding` is the pipeline that decodes, where it is another.
        """
        device = self.pipeline.device
        between = Clock(device)
        condition = self.condition()
        between.mark()
        latents = self.sample(denoiser, condition)
        between.mark()
        (decoding or self.pipeline).decode(latents)
        between.mark()
        spent = between.read()
        return dict(zip(STAGES, (*spent, sum(spent)), strict=True))


class Clock:
    """Milliseconds between marks, the first of which is its making; nothing is waited for between them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[float | torch.cuda.Event] = []
        synchronise(device)
        self.mark()

    def mark(self) -> None:
        """Note the time when the work queued so far is done."""
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter() * 1000)
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)

    def read(self) -> list[float]:
        """Milliseconds from each mark to the next, after all work is done."""
        synchronise(self.device)
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) if isinstance(a, torch.cuda.Event) else b - a for a, b in pairs]  # type: ignore[operator, arg-type]


@torch.no_grad()
def measure_stages(
    clip: OneClip,
    denoisers: Mapping[str, Denoiser],
    *,
    runs: int,
    warmup: int,
    decoding: Mapping[str, Pipeline] | None = None,
) -> dict[str, dict[str, Latency]]:
    """Of each denoiser, by the names of STAGES, making clips in turn (A B C A B C ...).

    `decoding` has the pipelines of those whose clips another VAE decodes.
    """
    others = decoding or {}
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in denoisers}
    for run in range(warmup + runs):
        for name, denoiser in denoisers.items():
            spent = clip.timed(denoiser, others.get(name))
            if run >= warmup:
                for stage, value in spent.items():
                    samples[name][stage].append(value)
    return {name: {stage: latency_of(of[stage]) for stage in STAGES} for name, of in samples.items()}
