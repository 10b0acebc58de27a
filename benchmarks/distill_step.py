"""What a step of distillation costs beyond the passes it consists of, and against a plain loop that repeats them.

The weights of the zoo's models are the real ones, those of published models are random; inputs are random, which
changes nothing about the time. README.md beside this file has the results.
"""

import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer
from torch import Tensor

from benchmarks.denoiser_latency import Subject, latency_text, subject_of
from benchmarks.plain_distillation import PlainLoop
from flows.terminal import explained
from tasks._stage import device_name, provenance, quieten
from vdmini_core.artifacts import Latency, LatentManifest, Provenance, Record, write_json
from vdmini_core.data.latents import CONDITION, LatentCache, condition_of, write_shard
from vdmini_core.diffusion.process import Process, VPrediction
from vdmini_core.distillation.heads import Discriminator
from vdmini_core.distillation.icmd import distill
from vdmini_core.distillation.losses import discriminator_hinge_loss, generator_hinge_loss
from vdmini_core.distillation.taps import encoder_features
from vdmini_core.evaluation.costs import latency_of, synchronise
from vdmini_core.models import Denoiser, Pipeline, load_pipeline
from vdmini_core.models.sources import resolve_source
from vdmini_core.models.untrained import random_inputs, untrained
from vdmini_core.pruning.planning import METHODS
from vdmini_core.settings import DistillSettings

PARTS = ("teacher", "student", "heads")
TARGET = 1.05
T = TypeVar("T")


class Timing(Record):
    """Milliseconds by the wall's clock and by the process's own, which on the CPU leaves out other programs' time.

    `peak_memory_bytes` is everything that is allocated on a CUDA device at the fullest moment, None on the CPU.
    """

    wall: Latency
    cpu: Latency
    peak_memory_bytes: int | None


class DistillStep(Record):
    """The result. `step_ratio` is step / (teacher + student + heads), `plain_ratio` is plain / step, by clock.

    Both are medians over the rounds of the alternation. `load` is how many programs wanted a core, per core.
    """

    command: str
    source: str
    latent_shape: tuple[int, ...]
    batch: int
    precision: str
    checkpointing: bool
    device: str
    timings: dict[str, Timing]
    step_ratio: dict[str, float]
    plain_ratio: dict[str, float] | None
    target: float
    load: float
    provenance: Provenance


@dataclass
class Sample:
    """One timed call."""

    wall_ms: float
    cpu_ms: float
    peak_bytes: int | None


class Stopwatch:
    """Times what happens between `start` and `stop`, by the wall's clock and the process's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        synchronise(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Sample:
        synchronise(self.device)
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return Sample(wall * 1000, cpu * 1000, peak)

    def time(self, call: Callable[[], object]) -> Sample:
        self.start()
        call()
        return self.stop()


class Passes:
    """The passes that a step cannot do without, each apart: teacher, student there and back, heads and encoder."""

    def __init__(
        self, teacher: Denoiser, student: Denoiser, process: Process, batch: dict[str, Any], settings: DistillSettings
    ) -> None:
        device = next(teacher.model.parameters()).device
        self.teacher, self.student, self.process = teacher, student, process
        self.heads = Discriminator(teacher.encoder_widths()).to(device)
        self.x0, self.condition = batch["latents"].to(device), condition_of(batch, device)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(self.x0.shape, generator=generator).to(device)
        self.sigma = torch.ones(len(self.x0), device=device)
        self.level = self.sigma.log() / 4
        self.noisy = process.noised(self.x0, self.noise, self.sigma)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.loop.precision != "fp32")

    def _features(self, x0: Tensor) -> list[Tensor]:
        noisy = self.process.noised(x0, self.noise, self.sigma)
        return encoder_features(self.teacher, noisy, self.process.time(self.sigma), self.condition)

    def run_teacher(self) -> None:
        with torch.no_grad(), self.autocast():
            self.teacher(self.noisy, self.process.time(self.sigma), self.condition)

    def run_student(self) -> None:
        self.student.model.requires_grad_(True)
        with self.autocast():
            loss = self.student(self.noisy, self.process.time(self.sigma), self.condition).float().square().mean()
        loss.backward()
        self.student.model.zero_grad(set_to_none=True)

    def run_heads(self) -> None:
        """Encoder and heads as a step has them: real once, fake there and back, both for the heads' own loss."""
        self.heads.requires_grad_(False)
        with self.autocast():
            with torch.no_grad():
                real = self._features(self.x0)
            fake = self._features(self.x0.detach().requires_grad_(True))
            loss = generator_hinge_loss(self.heads(fake, self.level))
        loss.backward()
        self.heads.requires_grad_(True)
        with self.autocast():
            logits = [self.heads([f.detach() for f in features], self.level) for features in (fake, real)]
            loss = discriminator_hinge_loss(*logits)
        loss.backward()
        self.heads.zero_grad(set_to_none=True)

    def calls(self) -> dict[str, Callable[[], None]]:
        return {"teacher": self.run_teacher, "student": self.run_student, "heads": self.run_heads}


def benchmark(
    subject: Subject, settings: DistillSettings, device: torch.device, *, warmup: int, command: str
) -> DistillStep:
    """Run the real loop; between its steps time the passes apart, and a step of the plain loop where there is a VAE."""
    runs = settings.loop.max_steps - warmup
    pipeline = None
    if subject.source.startswith("zoo:") or Path(subject.source).is_dir():
        pipeline = load_pipeline(resolve_source(subject.source), device=device)
        teacher, process = pipeline.denoiser, pipeline.process
    else:
        teacher, process = untrained(subject.found.build(), device, torch.float32), VPrediction()
    removed = METHODS[subject.plan.method](teacher, subject.plan)
    student, matches = teacher.without(removed), teacher.surviving(removed)
    samples: dict[str, list[Sample]] = {}
    watch = Stopwatch(device)
    with tempfile.TemporaryDirectory() as folder:
        data = random_clips(Path(folder), teacher, subject, 2 * settings.loop.batch_size)
        batch = data.shuffled(0, settings.loop.batch_size, 0)
        calls = Passes(teacher, student, process, batch, settings).calls()
        if pipeline is not None:
            plain = PlainLoop(pipeline, teacher.without(removed), matches, random_pixels(pipeline, batch), settings)
            calls["plain"] = plain.step

        def alternate(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
            for item in items:
                watch.start()
                yield item
                samples.setdefault("step", []).append(watch.stop())
                for name, call in calls.items():
                    samples.setdefault(name, []).append(watch.time(call))

        distill(teacher, student, matches, process, data, settings, device, track=alternate)
    kept = {name: found[warmup:] for name, found in samples.items()}
    assert all(len(found) == runs for found in kept.values())
    return DistillStep(
        command=command,
        source=subject.source,
        latent_shape=subject.latents,
        batch=settings.loop.batch_size,
        precision=settings.loop.precision,
        checkpointing=settings.checkpointing,
        device=device_name(device),
        timings={name: timing_of(found) for name, found in kept.items()},
        step_ratio=ratio(kept, ("step",), PARTS),
        plain_ratio=ratio(kept, ("plain",), ("step",)) if "plain" in kept else None,
        target=TARGET,
        load=os.getloadavg()[0] / (os.cpu_count() or 1),
        provenance=provenance(settings.model_dump(mode="json"), device, {}),
    )


def random_clips(folder: Path, teacher: Denoiser, subject: Subject, count: int) -> LatentCache:
    """An encode cache of `count` random clips on disk, read as a training reads its own."""
    drawn = [random_inputs(teacher, subject.latents, torch.device("cpu"), torch.float32, seed) for seed in range(count)]
    tensors = {CONDITION + name: torch.cat([told[name] for _, told in drawn]) for name in drawn[0][1]}
    tensors |= {"latents": torch.cat([latents for latents, _ in drawn]), "labels": torch.full((count, 3), -1)}
    made = provenance({}, torch.device("cpu"), {})
    shards = {"train": (write_shard(folder, "train", 0, tensors),)}
    manifest = LatentManifest(
        shards=shards, counts={"train": count}, teacher_digest="", data_digest="", provenance=made
    )
    write_json(folder / "latents.json", manifest)
    return LatentCache(folder, "train")


def random_pixels(pipeline: Pipeline, batch: dict[str, Any]) -> Tensor:
    """Clips [B, 3, T, H, W] in [-1, 1], which have latents of the batch's shape."""
    count, _, frames, height, width = batch["latents"].shape
    side = pipeline.vae_facts.spatial
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, frames, height * side, width * side, generator=generator) * 2 - 1


def timing_of(samples: list[Sample]) -> Timing:
    """Summary of the timed calls."""
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    return Timing(
        wall=latency_of([sample.wall_ms for sample in samples]),
        cpu=latency_of([sample.cpu_ms for sample in samples]),
        peak_memory_bytes=max(peaks, default=None),
    )


def ratio(samples: dict[str, list[Sample]], above: tuple[str, ...], below: tuple[str, ...]) -> dict[str, float]:
    """Median over rounds of sum(above) / sum(below), by either clock."""
    found = {}
    for clock in ("wall_ms", "cpu_ms"):
        rounds = zip(*(samples[name] for name in above + below), strict=True)
        sums = [(row[: len(above)], row[len(above) :]) for row in rounds]
        shares = [sum(getattr(s, clock) for s in top) / sum(getattr(s, clock) for s in low) for top, low in sums]
        found[clock.removesuffix("_ms")] = statistics.median(shares)
    return found


def table(result: DistillStep) -> str:
    """The result as a Markdown table of one row."""
    peaks = {name: found.peak_memory_bytes for name, found in result.timings.items()}
    plain = result.timings.get("plain")
    row = {
        "date": result.provenance.created[:10],
        "model": result.source,
        "latents": " x ".join(map(str, result.latent_shape)),
        "device, torch": f"{result.device}, {result.provenance.software['torch']}",
        "load a core": f"{result.load:.1f}",
        "precision": result.precision + ", checkpointing" * result.checkpointing,
        "batch": str(result.batch),
        "runs": str(result.timings["step"].wall.runs),
        "step ms (p10-p90)": latency_text(result.timings["step"].wall),
        **{f"{name} ms": f"{result.timings[name].wall.median_ms:.0f}" for name in PARTS},
        f"step / passes: wall, cpu (target {result.target})": clocks(result.step_ratio),
        "plain loop ms": f"{plain.wall.median_ms:.0f}" if plain else "-",
        "plain / step: wall, cpu": clocks(result.plain_ratio) if result.plain_ratio else "-",
        "peak GB: step, plain": ", ".join(f"{peak / 1e9:.2f}" for n in ("step", "plain") if (peak := peaks.get(n)))
        or "-",
        "commit": result.provenance.commit[:8] + " and changes" * result.provenance.dirty,
    }
    return "\n".join(f"| {' | '.join(line)} |" for line in (list(row), ["---"] * len(row), list(row.values())))


def clocks(found: dict[str, float]) -> str:
    """A ratio by either clock."""
    return f"{found['wall']:.3f}, {found['cpu']:.3f}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[str, typer.Argument(help="zoo:NAME, a pipeline's folder, or a published model such as svd-xt.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu.")] = "cuda",
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of autocast.")] = "bf16",
    batch: Annotated[int, typer.Option(min=1, help="Clips of a step.")] = 4,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="As distill.checkpointing.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 2,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Time the training loop's step against the passes it is made of, and against a plain loop; print a table row."""
    quieten()
    with explained():
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; try zoo:i2v-shapes --device cpu")
        loop = {"max_steps": warmup + runs, "batch_size": batch, "precision": precision}
        heads = {"warmup_steps": 0, "ramp_steps": 0}  # the adversarial loss counts from the first step on
        values = {"loop": loop, "learning_rate": 1e-6, "checkpointing": checkpointing, "discriminator": heads}
        words = [source, "--device", device, "--precision", precision, "--batch", str(batch)]
        words += ["--checkpointing"] * checkpointing + ["--runs", str(runs), "--warmup", str(warmup)]
        result = benchmark(
            subject_of(source, None, None),
            DistillSettings.model_validate(values),
            torch.device(device),
            warmup=warmup,
            command=shlex.join(["python", "-m", "benchmarks.distill_step", *words]),
        )
        if out:
            write_json(out, result)
    typer.echo(table(result))


if __name__ == "__main__":
    sys.exit(app())
