"""What sharing the first step and deciding units early save of a sensitivity sweep, and what they change in its answer.

Runs the sweep with all clips for every unit, asks what the stopping rule would have left out of it (a round depends on
nothing else, so that is what it measures), and repeats the first clips without sharing. README.md has the results.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from tasks._stage import device_name, provenance, quieten
from vdmini_core.artifacts import Provenance, Record, write_json
from vdmini_core.data.latents import LatentCache
from vdmini_core.evaluation.costs import count_costs
from vdmini_core.evaluation.evaluator import load_evaluator
from vdmini_core.evaluation.metrics.paired import PAIRED
from vdmini_core.models import load_pipeline
from vdmini_core.models.sources import evaluator_folder, resolve_source
from vdmini_core.pruning.sensitivity import DAMAGES, GATE_BLOCKS, Sensitivity
from vdmini_core.settings import SensitivitySettings

CALIBRATION_CLIPS = 16


class Ranking(Record):
    """The upper half of a kind of unit by one damage, most important first: with all clips, and with stopping."""

    kind: str
    damage: str
    all_clips: tuple[str, ...]
    stopped: tuple[str, ...]


class SweepComparison(Record):
    """FLOPs are the denoiser's; `largest_difference` is that of any paired measure of any clip, by sharing alone."""

    source: str
    settings: SensitivitySettings
    device: str
    naive_forward_flops: int
    shared_forward_flops: int
    stopped_forward_flops: int
    clips_measured: dict[str, int]
    rankings: tuple[Ranking, ...]
    naive_clips: int
    largest_difference: float
    provenance: Provenance


def main(
    source: Annotated[str, typer.Argument(help="As teacher.source; of an image-to-video or text-to-video pipeline.")],
    encoded: Annotated[Path, typer.Argument(help="Its clips as stage encode wrote them.")] = Path("artifacts/encode"),
    clips: Annotated[int, typer.Option(help="For every unit.")] = 24,
    batch: Annotated[int, typer.Option(help="Clips at a time.")] = 4,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    naive_clips: Annotated[int, typer.Option(help="In float32, without sharing; 0: none.")] = 2,
    scratch: Annotated[Path, typer.Option(help="Measured rounds; the same command goes on.")] = Path(".scratch/sweep"),
    json: Annotated[Path | None, typer.Option(help="Where the whole result goes.")] = None,
) -> None:
    """Compare the sweeps and print a row."""
    quieten()
    chosen = {"clips": clips, "batch_size": batch, "precision": precision, "calibration_clips": CALIBRATION_CLIPS}
    settings = SensitivitySettings.model_validate(chosen)
    found = compare_sweeps(source, encoded, settings, naive_clips, scratch)
    if json is not None:
        write_json(json, found)
    ratio = found.stopped_forward_flops / found.naive_forward_flops
    same_set = all(set(r.all_clips) == set(r.stopped) for r in found.rankings)
    same_order = all(r.all_clips == r.stopped for r in found.rankings)
    typer.echo(
        f"| {found.provenance.created[:10]} | {source} | {clips} clips, {settings.steps} steps, {batch} at a time, "
        f"{precision} | {found.device} | {found.naive_forward_flops / 1e12:.2f} "
        f"| {found.shared_forward_flops / found.naive_forward_flops:.3f} | {ratio:.3f} "
        f"| {'same' if same_set else 'differs'}, {'same' if same_order else 'differs'} "
        f"| {found.largest_difference:.1e} | {found.provenance.commit[:8]} |"
    )


def compare_sweeps(
    source: str, encoded: Path, settings: SensitivitySettings, naive_clips: int, scratch: Path
) -> SweepComparison:
    """The full sweep, the stopped one out of its rounds, and the unshared one of the first clips."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(resolve_source(source), ["denoiser", "vae"], device)
    data, judge = LatentCache(encoded, "train"), load_evaluator(evaluator_folder(), device)

    def analysis(folder: str, **changes: object) -> Sensitivity:
        return Sensitivity(pipeline, data, judge, settings.model_copy(update=changes), scratch=scratch / folder)

    whole, stopped = analysis("sweep", stop_early=False), analysis("sweep", stop_early=True)
    for sweep in (whole, stopped):
        sweep.sweep.run(sweep.groups, always=GATE_BLOCKS)
    costs = count_costs(whole.denoiser, whole.latents, whole.condition)
    flops = [sweep.flops(costs) for sweep in (whole, stopped)]
    few = {"clips": naive_clips, "batch_size": naive_clips, "precision": "fp32", "stop_early": False}
    return SweepComparison(
        source=source,
        settings=settings,
        device=device_name(device),
        naive_forward_flops=flops[0]["naive_forward_flops"],
        shared_forward_flops=flops[0]["forward_flops"],
        stopped_forward_flops=flops[1]["forward_flops"],
        clips_measured={name: len(stopped.sweep.measured(name)["content"]) for name in stopped.cuts},
        rankings=rankings(whole, stopped),
        naive_clips=naive_clips,
        largest_difference=largest_difference(analysis("shared", **few), analysis("naive", **few, share_start=False))
        if naive_clips
        else 0.0,
        provenance=provenance(settings.model_dump(mode="json"), device, {}),
    )


def rankings(whole: Sensitivity, stopped: Sensitivity) -> tuple[Ranking, ...]:
    """The upper halves, blocks and pairs apart, by content and by motion."""

    def upper(analysis: Sensitivity, group: list[str], damage: str) -> tuple[str, ...]:
        values = {name: float(analysis.sweep.measured(name)[damage].mean()) for name in group}
        return tuple(sorted(group, key=lambda name: -values[name])[: -(-len(group) // 2)])

    return tuple(
        Ranking(kind=kind, damage=d, all_clips=upper(whole, group, d), stopped=upper(stopped, group, d))
        for kind, group in zip(("block", "pair"), whole.groups, strict=True)
        if group
        for d in DAMAGES
    )


def largest_difference(shared: Sensitivity, naive: Sensitivity) -> float:
    """Between two sweeps of one round."""
    differences = []
    for analysis in (shared, naive):
        analysis.measure(list(analysis.cuts), 0)
    for name in shared.cuts:
        one, other = (analysis.sweep.measured(name) for analysis in (shared, naive))
        differences += [float((one[measure] - other[measure]).abs().max()) for measure in PAIRED]
    return max(differences)


if __name__ == "__main__":
    typer.run(main)
