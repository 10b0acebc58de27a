"""How much faster a pruned denoiser is than its teacher, and how much of what its FLOPs promise that is (eta).

Weights and inputs are random, which changes nothing about the time. README.md beside this file has the results.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor

from flows.recipes import find_recipe, recipes
from flows.terminal import explained
from tasks._stage import device_name, provenance, quieten
from vdmini_core.artifacts import Latency, Provenance, Record, write_json
from vdmini_core.evaluation.costs import elapsed_ms, measure_latencies, measure_units
from vdmini_core.models import Denoiser, TransformerDenoiser, UnusableModel
from vdmini_core.models.published import Blueprint, blueprint
from vdmini_core.models.untrained import random_inputs, untrained
from vdmini_core.models.vae_facts import LatentShape
from vdmini_core.pruning.dry_run import PlannedUnits, count_on_meta
from vdmini_core.pruning.planning import Evidence, choose
from vdmini_core.settings import PlanSettings, height_and_width, load_params

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIDES = ("teacher", "student")
UNIT_RUNS = 5
NOTES = (
    "one forward pass of one clip, random weights and inputs, texts as long as the stock pipeline pads them",
    "teacher and student in turn (A B A B ...); they share the weights that both have, so that they fit together",
)

ClipShape = tuple[int, int, int]
"""Frames, height, width"""


class Mode(Record):
    """Teacher and student, both eager or both compiled.

    `speedup` is of the medians, teacher / student; `eta` is that times student / teacher FLOPs: 1 where time
    follows FLOPs. `peak_memory_bytes` is one network's weights and the most that a call has alive beside them,
    None on the CPU; `compile_s` is the first compiled call, which compiles, None for eager.
    """

    mode: Literal["eager", "compiled"]
    latency: dict[str, Latency]
    speedup: float
    eta: float
    teraflops_per_s: dict[str, float]
    peak_memory_bytes: dict[str, int] | None
    compile_s: dict[str, float] | None


class UnitCost(Record):
    """A unit's FLOPs, and its milliseconds in the eager teacher while every unit is waited for."""

    name: str
    removed: bool
    flops: int
    latency_ms: float


class DenoiserLatency(Record):
    """The result; the dictionaries hold teacher and student, `flop_ratio` is student / teacher, the batch is 1."""

    command: str
    source: str
    denoiser: str
    clip_shape: ClipShape | None
    latent_shape: LatentShape
    dtype: str
    device: str
    cuda: str | None
    plan: PlannedUnits
    parameters: dict[str, int]
    flops: dict[str, int]
    flop_ratio: float
    eta_target: float
    modes: tuple[Mode, ...]
    teacher_units: tuple[UnitCost, ...]
    notes: tuple[str, ...]
    provenance: Provenance


@dataclass(frozen=True)
class Subject:
    """What is timed; `clip` is None where only the latents are known."""

    source: str
    found: Blueprint
    clip: ClipShape | None
    latents: LatentShape
    plan: PlanSettings


def subject_of(source: str, frames: int | None, size: tuple[int, int] | None) -> Subject:
    """A recipe with its clips and plan, or a model with the clips it was made for and the usual plan of its kind.

    `frames` and `size` (height, width) take the place of what is known. ValueError says what there is, or is missing.
    """
    if source in recipes() or Path(source).is_file():
        params = load_params(find_recipe(source))
        found, plan = blueprint(params.teacher.source), params.plan
        frames, size = frames or params.data.frames, size or height_and_width(params.data.size)
    else:
        try:
            found = blueprint(source)
        except UnusableModel as error:
            raise UnusableModel(f"{error}; the recipes are {', '.join(recipes())}") from None
        plan = PlanSettings(method="uniform" if isinstance(found.build(), TransformerDenoiser) else "paper")
    if frames is None and size is None:
        if found.latents is None:
            raise ValueError(f"{source} does not say what clips it was made for; give --frames, --height and --width")
        return Subject(source, found, None, found.latents, plan)
    if frames is None or size is None:
        raise ValueError(f"{source} is no recipe; give --frames, --height and --width together, or none of them")
    if found.vae is None:
        raise ValueError(f"{source} has no vae/config.json of a known VAE, so its latents of a clip are not known")
    return Subject(source, found, (frames, *size), found.vae.latent_shape(frames, *size), plan)


def benchmark(
    subject: Subject,
    device: torch.device,
    dtype: str,
    *,
    compiled: bool,
    units: bool,
    runs: int,
    warmup: int,
    command: str,
    say: Callable[[str], None],
) -> DenoiserLatency:
    """Build teacher and student with random weights, time them, and compare that with their FLOPs."""
    blank = subject.found.build()
    say(f"counting the FLOPs of latents {' x '.join(map(str, subject.latents))}")
    whole = count_on_meta(blank, subject.latents, subject.source)
    removed = choose(blank, subject.plan, Evidence(whole.table()))
    costs = [whole, count_on_meta(blank.without(removed), subject.latents, subject.source)]
    flops = {name: cost.flops for name, cost in zip(SIDES, costs, strict=True)}

    say(f"drawing {costs[0].parameters:,} weights in {dtype}")
    teacher = untrained(blank, device, DTYPES[dtype])
    denoisers = {"teacher": teacher, "student": teacher.without(removed, shared=True)}
    latents, condition = random_inputs(teacher, subject.latents, device, DTYPES[dtype])
    time = torch.ones(1, device=device)
    calls = {name: partial(denoiser, latents, time, condition) for name, denoiser in denoisers.items()}

    def timed(mode: Literal["eager", "compiled"]) -> Mode:
        say(f"{mode}: a first call, then {warmup} + {runs} of each")
        compile_s = {name: elapsed_ms(calls[name], device) / 1000 for name in SIDES} if mode == "compiled" else None
        peaks = {name: checked_peak_bytes(denoisers[name], call, name, device) for name, call in calls.items()}
        latency = measure_latencies(calls, device, runs=runs, warmup=warmup)
        speedup = latency["teacher"].median_ms / latency["student"].median_ms
        return Mode(
            mode=mode,
            latency=latency,
            speedup=speedup,
            eta=speedup * flops["student"] / flops["teacher"],
            teraflops_per_s={name: flops[name] / 1e9 / latency[name].median_ms for name in SIDES},
            peak_memory_bytes=peaks if device.type == "cuda" else None,
            compile_s=compile_s,
        )

    with torch.no_grad():
        modes = [timed("eager")]
        spent = measure_units(teacher, latents, condition, runs=min(runs, UNIT_RUNS)) if units else {}
        if compiled:
            for denoiser in denoisers.values():
                denoiser.model.compile(dynamic=False)  # else the second network's widths would be taken for variables
            modes.append(timed("compiled"))
    return DenoiserLatency(
        command=command,
        source=subject.source,
        denoiser=type(teacher.model).__name__,
        clip_shape=subject.clip,
        latent_shape=subject.latents,
        dtype=dtype,
        device=device_name(device),
        cuda=torch.version.cuda,
        plan=PlannedUnits(
            method=subject.plan.method,
            removed=removed,
            kept=tuple(unit.name for unit in teacher.units if unit.name not in removed),
        ),
        parameters={name: cost.parameters for name, cost in zip(SIDES, costs, strict=True)},
        flops=flops,
        flop_ratio=flops["student"] / flops["teacher"],
        eta_target=0.95 if isinstance(teacher, TransformerDenoiser) else 0.90,
        modes=tuple(modes),
        teacher_units=tuple(
            UnitCost(name=name, removed=name in removed, flops=costs[0].unit_flops[name], latency_ms=ms)
            for name, ms in spent.items()
        ),
        notes=NOTES,
        provenance=provenance(subject.plan.model_dump(mode="json"), device, {}),
    )


def checked_peak_bytes(denoiser: Denoiser, call: Callable[[], Tensor], name: str, device: torch.device) -> int:
    """The network's weights and the most that one call has alive beside them (on the CPU: the weights alone).

    ValueError where the answer has values that are not finite, since their time would mean nothing.
    """
    before = after = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    answer = call()
    if device.type == "cuda":
        after = torch.cuda.max_memory_allocated(device)
    if not answer.isfinite().all():
        raise ValueError(f"the {name}'s answer is not finite with random weights; its time would mean nothing")
    return sum(int(parameter.nbytes) for parameter in denoiser.model.parameters()) + after - before


def table(result: DenoiserLatency) -> str:
    """The result as a Markdown table, one row a mode."""
    shape, what = (result.clip_shape, "clip") if result.clip_shape else (result.latent_shape, "latents")
    commit = result.provenance.commit[:8] + " and changes" * result.provenance.dirty
    rows = [
        {
            "date": result.provenance.created[:10],
            "model": result.source,
            what: " x ".join(map(str, shape)),
            "device, torch": f"{result.device}, {result.provenance.software['torch']}",
            "dtype": result.dtype,
            "mode": found.mode,
            **{f"{name} ms (p10-p90)": latency_text(found.latency[name]) for name in SIDES},
            "runs": str(found.latency["teacher"].runs),
            "speed-up": f"{found.speedup:.3f}",
            "FLOPs student / teacher": f"{result.flop_ratio:.3f}",
            "eta (target)": f"{found.eta:.3f} ({result.eta_target:.2f})",
            "TFLOP/s": both(found.teraflops_per_s, "{:.3g}"),
            "peak GB": both({k: v / 1e9 for k, v in (found.peak_memory_bytes or {}).items()}, "{:.2f}"),
            "compile s": both(found.compile_s or {}, "{:.1f}"),
            "commit": commit,
        }
        for found in result.modes
    ]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latency_text(latency: Latency) -> str:
    """Median and outer deciles."""
    return f"{latency.median_ms:.2f} ({latency.p10_ms:.2f}-{latency.p90_ms:.2f})"


def both(values: dict[str, float], form: str) -> str:
    """Teacher's and student's number, or a dash where there are none."""
    return ", ".join(form.format(values[name]) for name in SIDES) if values else "-"


def removed_shares(result: DenoiserLatency) -> str:
    """What the removed units are of all units' FLOPs and time: where the two differ, eta differs from 1."""

    def share(cost: Callable[[UnitCost], float]) -> float:
        return sum(cost(unit) for unit in result.teacher_units if unit.removed) / sum(map(cost, result.teacher_units))

    flops, time = share(lambda unit: unit.flops), share(lambda unit: unit.latency_ms)
    return f"the removed units are {flops:.1%} of all units' FLOPs and {time:.1%} of their time in the eager teacher"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[str, typer.Argument(help="A recipe, a params file, zoo:NAME, a model's folder, a hub id.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu.")] = "cuda",
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of weights and latents.")] = "bf16",
    frames: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels, with --width.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels, with --height.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time both under torch.compile as well.")] = False,
    units: Annotated[bool, typer.Option("--units", help="Time every unit of the teacher as well.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each network.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Calls of each before those.")] = 5,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Time one forward pass of teacher and student; print rows for the table in benchmarks/README.md.

    Needs neither weights nor data. The student is what the recipe's plan leaves of the teacher.
    """
    quieten()
    with explained():
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; try a small model, such as zoo:i2v-shapes --device cpu")
        if (height is None) != (width is None):
            raise ValueError("give --height and --width together")
        subject = subject_of(source, frames, None if height is None or width is None else (height, width))
        options = {"--device": device, "--dtype": dtype, "--frames": frames, "--height": height, "--width": width}
        words = [str(word) for pair in options.items() if pair[1] is not None for word in pair]
        words += ["--compile"] * compiled + ["--units"] * units + ["--runs", str(runs), "--warmup", str(warmup)]
        try:
            result = benchmark(
                subject,
                torch.device(device),
                dtype,
                compiled=compiled,
                units=units,
                runs=runs,
                warmup=warmup,
                command=shlex.join(["python", "benchmarks/denoiser_latency.py", source, *words]),
                say=partial(typer.echo, err=True),
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{source} does not fit this device; give fewer --frames or a smaller clip: {error}"
            ) from None
        if out:
            write_json(out, result)
    typer.echo(table(result))
    if result.teacher_units:
        typer.echo(f"\n{removed_shares(result)}")


if __name__ == "__main__":
    sys.exit(app())
