"""Where the time of one clip goes, and how much of it a student saves: encoder, denoiser, VAE decoding, end to end.

README.md beside this file says how it is measured.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from benchmarks.denoiser_latency import SIDES, both, latency_text
from flows.cli import explained
from flows.recipes import find_recipe, recipes
from tasks._stage import device_name, provenance, quieten
from vdmini_core.artifacts import Latency, Provenance, Record, write_json
from vdmini_core.evaluation.compare import with_vae
from vdmini_core.evaluation.costs import RATIO_RUNS, count_call, count_costs, elapsed_ms, measure_latencies, speedup
from vdmini_core.evaluation.stage_times import OneClip, measure_stages
from vdmini_core.models import Denoiser, Pipeline, TransformerDenoiser, load_denoiser, load_pipeline
from vdmini_core.models.sources import resolve_source
from vdmini_core.models.vae_facts import LatentShape
from vdmini_core.pruning.planning import METHODS
from vdmini_core.settings import EvaluateSettings, PlanSettings, height_and_width, load_params

NOTES = (
    "batch 1, no classifier-free guidance; image encoding on the host is part of the encoder",
    "clips of teacher and student in turn (A B A B ...), every part timed within the whole",
)


class Mode(Record):
    """Both denoisers eager, or both compiled; the encoder and the VAE are eager in either.

    `step` is one call of the denoiser, `stages` the parts of whole clips (denoiser: all its calls). The ratios are of
    medians, teacher / student, None from fewer than 30 runs; `eta` is the step's times student / teacher FLOPs.
    `peak_memory_bytes`, by side and stage, is the weights of what works and the most alive beside them, None on the
    CPU. `compile_s` is each first compiled call.
    """

    mode: Literal["eager", "compiled"]
    step: dict[str, Latency]
    stages: dict[str, dict[str, Latency]]
    step_speedup: float | None
    end_to_end_speedup: float | None
    eta: float | None
    peak_memory_bytes: dict[str, dict[str, int]] | None
    compile_s: dict[str, float] | None


class EndToEnd(Record):
    """The result. FLOPs are of one call each of encoder, denoiser (teacher, student) and VAE decoder."""

    command: str
    source: str
    student: str
    clip_shape: tuple[int, int, int]
    latent_shape: LatentShape
    steps: int
    precision: str
    device: str
    cuda: str | None
    parameters: dict[str, int]
    flops: dict[str, int]
    flop_ratio: float
    modes: tuple[Mode, ...]
    notes: tuple[str, ...]
    provenance: Provenance


@dataclass(frozen=True)
class Subject:
    """What is timed: a whole pipeline with weights, its student, and the clip."""

    source: str
    pipeline: Pipeline
    student: Denoiser
    student_name: str
    clip: tuple[int, int, int]
    steps: int
    vae: Path | None = None


def subject_of(
    source: str,
    student: Path | None,
    shape: tuple[int | None, int | None, int | None],
    steps: int | None,
    device: torch.device,
) -> Subject:
    """A recipe with its clips, steps and plan, or a model with its own clips and the usual plan of its kind.

    `shape` (frames, height, width) and `steps` take the place of what is known, where they are given; `student` is a
    denoiser's folder, as stages prune and distill write it, in place of what the plan leaves.
    """
    params = load_params(find_recipe(source)) if source in recipes() or Path(source).is_file() else None
    model = params.teacher.source if params else source
    pipeline = load_pipeline(resolve_source(model, params.teacher.revision if params else None), device=device)
    teacher = pipeline.denoiser
    known = (params.data.frames, *height_and_width(params.data.size)) if params else pipeline.default_shape()
    frames, height, width = (given or own for given, own in zip(shape, known, strict=True))
    if student is not None:
        small, name = load_denoiser(student, device), str(student)
    else:
        usual = PlanSettings(method="uniform" if isinstance(teacher, TransformerDenoiser) else "paper")
        plan = params.plan if params and params.plan.method in METHODS else usual
        removed = METHODS[plan.method](teacher, plan)
        small, name = teacher.without(removed, shared=True), f"{plan.method} without {', '.join(removed)}"
    steps = steps or (params.evaluate if params else EvaluateSettings()).steps
    return Subject(source, pipeline, small, name, (frames, height, width), steps)


@torch.no_grad()
def benchmark(
    subject: Subject,
    precision: Literal["bf16", "fp32"],
    *,
    compiled: bool,
    runs: int,
    warmup: int,
    command: str,
    say: Callable[[str], None],
) -> EndToEnd:
    """Time the parts and the whole for teacher and student, and count what each part computes."""
    pipeline, device = subject.pipeline, subject.pipeline.device
    denoisers = dict(zip(SIDES, (pipeline.denoiser, subject.student), strict=True))
    latents = pipeline.latent_shape(*subject.clip)
    clip = OneClip.of_latents(pipeline, latents, subject.steps)
    reduced = partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
    condition = clip.condition()
    level = torch.ones(1, device=device)
    calls = {name: partial(denoiser, clip.noise, level, condition) for name, denoiser in denoisers.items()}
    say("counting FLOPs")
    costs = {name: count_costs(denoiser, clip.noise, condition) for name, denoiser in denoisers.items()}
    fixed = {name: count for name, count in pipeline.parameter_counts().items() if name != pipeline.denoiser_folder()}
    flops = {
        "encoder": count_call(clip.condition),
        **{name: cost.flops for name, cost in costs.items()},
        "vae_decode": count_call(lambda: pipeline.decode(clip.noise)),
    }
    flop_ratio = flops["student"] / flops["teacher"]

    decoding = {"student": with_vae(pipeline, subject.vae)} if subject.vae else None

    def timed(mode: Literal["eager", "compiled"]) -> Mode:
        say(f"{mode}: {warmup} + {runs} clips and single calls of each")
        with reduced():
            first = {name: elapsed_ms(call, device) / 1000 for name, call in calls.items()}
            peaks = {name: peak_bytes(clip, denoiser) for name, denoiser in denoisers.items()}
            step = measure_latencies(calls, device, runs=runs, warmup=warmup)
            stages = measure_stages(clip, denoisers, runs=runs, warmup=warmup, decoding=decoding)
        of_step = speedup(step["teacher"], step["student"])
        return Mode(
            mode=mode,
            step=step,
            stages=stages,
            step_speedup=of_step,
            end_to_end_speedup=speedup(stages["teacher"]["end_to_end"], stages["student"]["end_to_end"]),
            eta=None if of_step is None else of_step * flop_ratio,
            peak_memory_bytes=peaks if device.type == "cuda" else None,
            compile_s=first if mode == "compiled" else None,
        )

    modes = [timed("eager")]
    if compiled:
        for denoiser in denoisers.values():
            denoiser.model.compile(dynamic=False)  # else the second network's widths would be taken for variables
        modes.append(timed("compiled"))
    return EndToEnd(
        command=command,
        source=subject.source,
        student=subject.student_name,
        clip_shape=subject.clip,
        latent_shape=latents,
        steps=subject.steps,
        precision=precision,
        device=device_name(device),
        cuda=torch.version.cuda,
        parameters={**fixed, **{name: cost.parameters for name, cost in costs.items()}},
        flops=flops,
        flop_ratio=flop_ratio,
        modes=tuple(modes),
        notes=NOTES,
        provenance=provenance({"steps": subject.steps}, device, {}),
    )


def peak_bytes(clip: OneClip, denoiser: Denoiser) -> dict[str, int]:
    """Of encoder, one sampling and VAE decoding: the weights of what works, and the most alive beside all weights.

    ValueError where a clip has values that are not finite, since their time would mean nothing. On the CPU the
    allocator is not asked, so that the figures are the weights alone.
    """
    device, pipeline = clip.pipeline.device, clip.pipeline
    weights = {name: sum(int(p.nbytes) for p in part.parameters()) for name, part in networks(pipeline).items()}
    vae, encoders = weights.pop("vae"), sum(weights.values())
    own = sum(int(p.nbytes) for p in denoiser.model.parameters())

    def rise(call: Callable[[], object]) -> int:
        if device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before

    condition = clip.condition()
    latents = clip.sample(denoiser, condition)
    if not pipeline.decode(latents).isfinite().all():
        raise ValueError("the clip has values that are not finite; its time would mean nothing (try --precision fp32)")
    parts = {
        "encoder": encoders + vae + rise(clip.condition),
        "denoiser": own + rise(lambda: clip.sample(denoiser, condition)),
        "vae_decode": vae + rise(lambda: pipeline.decode(latents)),
    }
    return {**parts, "end_to_end": encoders + vae + own + rise(lambda: clip.timed(denoiser))}


def networks(pipeline: Pipeline) -> dict[str, torch.nn.Module]:
    """The VAE and the encoders by name."""
    return {name: part for name, part in pipeline.models.items() if name != pipeline.denoiser_folder()}


def table(result: EndToEnd) -> str:
    """The result as a Markdown table, one row a mode."""
    commit = result.provenance.commit[:8] + " and changes" * result.provenance.dirty

    def ratio(value: float | None) -> str:
        return f"{value:.3f}" if value is not None else f"- (needs {RATIO_RUNS} runs)"

    rows = []
    for found in result.modes:
        teacher, student = (found.stages[name] for name in SIDES)
        peaks = {k: v["end_to_end"] / 1e9 for k, v in (found.peak_memory_bytes or {}).items()}
        rows.append(
            {
                "date": result.provenance.created[:10],
                "model": result.source,
                "clip, steps": f"{' x '.join(map(str, result.clip_shape))}, {result.steps}",
                "device, torch": f"{result.device}, {result.provenance.software['torch']}",
                "precision": result.precision,
                "mode": found.mode,
                "encoder ms (p10-p90)": latency_text(teacher["encoder"]),
                "denoiser step ms": ", ".join(latency_text(found.step[name]) for name in SIDES),
                "all steps ms": ", ".join(latency_text(found.stages[name]["denoiser"]) for name in SIDES),
                "VAE decode ms": f"{latency_text(teacher['vae_decode'])}, {latency_text(student['vae_decode'])}",
                "end to end ms": f"{latency_text(teacher['end_to_end'])}, {latency_text(student['end_to_end'])}",
                "runs": str(teacher["end_to_end"].runs),
                "speed-up step, end to end": f"{ratio(found.step_speedup)}, {ratio(found.end_to_end_speedup)}",
                "step FLOPs student / teacher": f"{result.flop_ratio:.3f}",
                "eta": ratio(found.eta),
                "peak GB": both(peaks, "{:.2f}"),
                "compile s": both(found.compile_s or {}, "{:.1f}"),
                "commit": commit,
            }
        )
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def costs_text(result: EndToEnd) -> str:
    """Parameters and FLOPs of every part in a line each."""
    parameters = ", ".join(f"{name} {count / 1e6:.3f} M" for name, count in result.parameters.items())
    flops = ", ".join(f"{name} {count / 1e9:.4g} G" for name, count in result.flops.items())
    return f"parameters: {parameters}\nFLOPs of one call: {flops}\nstudent: {result.student}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[
        str, typer.Argument(help="A recipe, a params file, zoo:NAME, a pipeline's folder; with weights.")
    ],
    student: Annotated[
        Path | None, typer.Option(help="A denoiser's folder; else the plan's, with our weights.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="The student's VAE, as stage decoder writes it.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu.")] = "cuda",
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="bf16: the networks under autocast.")] = "bf16",
    frames: Annotated[int | None, typer.Option(min=1, help="Instead of what the model was made for.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Calls of the denoiser a clip.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Once more with both denoisers compiled.")] = False,
    runs: Annotated[int, typer.Option(min=1, help=f"Timed clips of each; fewer than {RATIO_RUNS}: no ratio.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Clips of each before those.")] = 5,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Time text or image encoder, denoiser, VAE decoding and whole clips, of a teacher and its student in turn."""
    quieten()
    with explained():
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; try a small model, such as zoo:i2v-shapes --device cpu")
        subject = subject_of(source, student, (frames, height, width), steps, torch.device(device))
        subject = replace(subject, vae=vae)
        try:
            result = benchmark(
                subject,
                precision,
                compiled=compiled,
                runs=runs,
                warmup=warmup,
                command=shlex.join(["python", "-m", "benchmarks.end_to_end", *sys.argv[1:]]),
                say=partial(typer.echo, err=True),
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{source} does not fit this device; make the clip smaller: {error}") from None
        if out:
            write_json(out, result)
    typer.echo(f"{table(result)}\n\n{costs_text(result)}")


if __name__ == "__main__":
    sys.exit(app())
