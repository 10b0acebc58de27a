"""Whether a student is as fast as the planner predicts from the latencies of the teacher's units.

Weights and inputs are random, which changes nothing about the time; where they lie in memory does, by several percent,
so all networks are built anew a few times. README.md beside this file has the results.
"""

import os
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from flows.cli import explained
from tasks._stage import device_name, provenance, quieten
from vdmini_core.artifacts import Latency, Provenance, Record, write_json
from vdmini_core.evaluation.costs import PartLatencies, latency_of, mean_of_faster_half, measure_parts, time_in_turn
from vdmini_core.models import Denoiser, IllegalPlan
from vdmini_core.models.published import blueprint
from vdmini_core.models.untrained import random_inputs, untrained
from vdmini_core.pruning.dry_run import count_on_meta
from vdmini_core.pruning.planning import Evidence, choose, predict
from vdmini_core.settings import PlanSettings

TEACHER = "teacher"


class Check(Record):
    """One plan: shares of the teacher's latency, and the error of the predicted one, relative to the measured one."""

    removed: tuple[str, ...]
    predicted: float
    measured: float
    error: float
    latency: Latency


class PlanLatency(Record):
    """The result; a call is of one clip. `parts_ms` is the teacher's while its units are timed."""

    source: str
    device: str
    load: float
    teacher: Latency
    parts_ms: float
    checks: tuple[Check, ...]
    median_error: float
    largest_error: float
    provenance: Provenance


def some_plans(denoiser: Denoiser, evidence: Evidence, count: int, smallest: float) -> list[tuple[str, ...]]:
    """Different legal plans of every size from about `smallest` of the teacher's latency to little less than all."""
    found: dict[tuple[str, ...], None] = {}
    for seed in range(20):
        for ratio in np.linspace(smallest, 0.95, count):
            asked = PlanSettings(method="random", budget="latency", ratio=float(ratio), seed=seed)
            found.setdefault(choose(denoiser, asked, evidence))
            if len(found) == count:
                return list(found)
    raise IllegalPlan(f"{count} different plans are wanted, there are {len(found)}; ask for fewer")


def check(
    source: str, device: torch.device, plans: int, smallest: float, runs: int, warmup: int, builds: int
) -> PlanLatency:
    """Plan, build the students, and time the teacher's units, the teacher and the students in turn."""
    found = blueprint(source)
    if found.latents is None:
        raise ValueError(f"{source} does not say what clips it was made for; use zoo:i2v-shapes or a published model")
    counted = count_on_meta(found.build(), found.latents, source)
    teacher = untrained(found.build(), device, torch.float32)
    latents, condition = random_inputs(teacher, found.latents, device, torch.float32)
    first = measure_parts(teacher, latents, condition, runs=warmup + 3, warmup=warmup)
    removals = some_plans(teacher, Evidence(counted.table(first)), plans, smallest)

    time = torch.ones(1, device=device)
    timed: list[PartLatencies] = []
    samples: dict[str, list[float]] = defaultdict(list)
    lain: list[torch.Tensor] = []
    for build in range(builds):
        lain.append(torch.empty((build + 1) * 100_003, device=device))  # so that what follows lies elsewhere
        teacher, given = untrained(found.build(), device, torch.float32), latents.clone()
        networks = {TEACHER: teacher} | {str(i): teacher.without(r, shared=True) for i, r in enumerate(removals)}
        calls = {name: partial(network, given, time, condition) for name, network in networks.items()}
        of_build: list[PartLatencies] = []

        def time_parts(teacher: Denoiser = teacher, given: torch.Tensor = given, out: Any = of_build) -> None:
            out.append(measure_parts(teacher, given, condition, runs=1, warmup=0))

        with torch.no_grad():
            spent = time_in_turn({"": time_parts} | calls, device, runs=runs, warmup=warmup)
        timed += of_build[warmup:]
        for name in networks:
            samples[name] += spent[name]
    latencies = {name: latency_of(values) for name, values in samples.items()}
    parts = mean_of_faster_half(timed)
    evidence = Evidence(counted.table(parts))
    checks = []
    for index, removed in enumerate(removals):
        predicted = predict(teacher, PlanSettings(), evidence, removed).latency
        assert predicted is not None
        measured = latencies[str(index)].median_ms / latencies[TEACHER].median_ms
        error = predicted / measured - 1
        checks.append(
            Check(removed=removed, predicted=predicted, measured=measured, error=error, latency=latencies[str(index)])
        )
    errors = [abs(one.error) for one in checks]
    return PlanLatency(
        source=source,
        device=device_name(device),
        load=os.getloadavg()[0] / (os.cpu_count() or 1),
        teacher=latencies[TEACHER],
        parts_ms=parts.whole_ms,
        checks=tuple(checks),
        median_error=statistics.median(errors),
        largest_error=max(errors),
        provenance=provenance(
            {"plans": plans, "builds": builds, "runs": runs, "warmup": warmup, "smallest": smallest}, device, {}
        ),
    )


def table(result: PlanLatency) -> str:
    """The row for README.md, and a line for each plan."""
    shares = [one.measured for one in result.checks]
    cells = {
        "date": result.provenance.created[:10],
        "model": result.source,
        "device, torch": f"{result.device}, {result.provenance.software['torch']}",
        "load a core": f"{result.load:.1f}",
        "teacher ms (p10-p90)": f"{result.teacher.median_ms:.2f} "
        f"({result.teacher.p10_ms:.2f}-{result.teacher.p90_ms:.2f})",
        "runs": str(result.teacher.runs),
        "plans": str(len(result.checks)),
        "student / teacher": f"{min(shares):.2f}-{max(shares):.2f}",
        "error: median, largest (target 0.05)": f"{result.median_error:.3f}, {result.largest_error:.3f}",
        "commit": result.provenance.commit[:8] + " and changes" * result.provenance.dirty,
    }
    lines = [list(cells), ["---"] * len(cells), list(cells.values())]
    plans = [
        f"{one.predicted:.3f} predicted, {one.measured:.3f} measured, error {one.error:+.3f}: {', '.join(one.removed)}"
        for one in sorted(result.checks, key=lambda one: one.measured)
    ]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *plans])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[str, typer.Argument(help="zoo:NAME, or a model as `vdmini units` takes it.")] = "zoo:i2v-shapes",
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu.")] = "cpu",
    plans: Annotated[int, typer.Option(min=1, help="Students to build and time.")] = 12,
    smallest: Annotated[
        float, typer.Option(min=0.01, max=0.95, help="Latency of the smallest, of the teacher's.")
    ] = 0.3,
    runs: Annotated[
        int, typer.Option(min=1, help="Timed calls of each network and build, and of the teacher for its units.")
    ] = 6,
    warmup: Annotated[int, typer.Option(min=0, help="Calls of each before those.")] = 1,
    builds: Annotated[int, typer.Option(min=1, help="How often all networks are built anew.")] = 8,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Predict the latency of random legal plans, build them, and measure it; print a row for benchmarks/README.md."""
    quieten()
    with explained():
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here; use --device cpu")
        result = check(source, torch.device(device), plans, smallest, runs, warmup, builds)
        if out:
            write_json(out, result)
    typer.echo(table(result))


if __name__ == "__main__":
    sys.exit(app())
