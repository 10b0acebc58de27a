"""What every block and R-A pair is worth: bypass it, generate, and judge content and motion.

Paper, Figs. 1 and A4-A6, with two judges instead of one FVD: content and motion apart.
"""

from collections.abc import Sequence
from typing import Any

from vdmini_core.artifacts import Provenance, Quality, SensitivityReport, UnitScore, json_digest
from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.evaluation.costs import count_costs, measure_units
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.evaluation.quality import Judged, compare, decoded_batches, generated_batches, judge
from vdmini_core.models import Pipeline
from vdmini_core.models.graph import expand
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import SensitivitySettings

GATE_ACCURACY = 0.9
GATE_BLOCKS = ("D.2", "U.1")
HARMFUL_DROP = 0.1


def measure_sensitivity(
    pipeline: Pipeline,
    data: LatentCache,
    evaluator: Evaluator,
    settings: SensitivitySettings,
    protocol: dict[str, Any],
    provenance: Provenance,
    track: Track = silent_track,
) -> SensitivityReport:
    """Score every block and pair of the pipeline's denoiser on the same conditions and noise."""
    denoiser = pipeline.denoiser
    first = next(data.batches(1, 1))
    condition = condition_of(first, pipeline.device)
    latents = first["latents"].to(pipeline.device)
    costs = count_costs(denoiser, latents, condition)
    latency = measure_units(denoiser, latents, condition, runs=settings.latency_runs)

    count = min(max(settings.gate_clips, settings.clips), len(data))
    real = judge(decoded_batches(pipeline, data, count, settings), evaluator)
    reference = real.first(settings.clips)
    other = judge(decoded_batches(pipeline, data, settings.clips, settings, settings.clips), evaluator)

    def quality_without(names: Sequence[str]) -> Quality:
        with denoiser.bypass(names):
            judged: Judged = judge(generated_batches(pipeline, denoiser, data, settings), evaluator)
        return compare(judged, reference)

    more = settings.model_copy(update={"clips": count})
    intact = judge(generated_batches(pipeline, denoiser, data, more, track, "intact teacher"), evaluator)
    teacher, baseline = compare(intact, real), compare(intact.first(settings.clips), reference)
    # A block of a single unit (the mid block) is scored once, as a block.
    blocks = [(block, "block") for block in denoiser.blocks]
    pairs = [(unit.name, "pair") for unit in denoiser.units if unit.name != unit.block]
    scores = []
    for name, kind in track(blocks + pairs, "bypass", len(blocks) + len(pairs)):
        members = expand([name], denoiser.units)
        scores.append(
            UnitScore(
                name=name,
                kind=kind,
                depth=next(u.depth for u in denoiser.units if u.name == members[0]),
                parameters=sum(costs.unit_parameters[m] for m in members),
                flops=sum(costs.unit_flops[m] for m in members),
                latency_ms=sum(latency[m] for m in members),
                quality=quality_without([name]),
            )
        )
    return SensitivityReport(
        protocol=protocol,
        protocol_digest=json_digest(protocol),
        teacher=teacher,
        baseline=baseline,
        floor=compare(other, reference),
        scores=tuple(scores),
        teacher_gates=teacher_gates(teacher, baseline, scores),
        provenance=provenance,
    )


def teacher_gates(teacher: Quality, baseline: Quality, scores: Sequence[UnitScore]) -> dict[str, bool]:
    """Whether the teacher is fit for conclusions about blocks; empty where clips carry no labels.

    Accuracies of at least 0.9 (`teacher`), and a drop from `baseline` of at least 0.1 in content or motion
    accuracy without D.2 or without U.1: somewhere deep there must be something to lose.
    """
    if baseline.content_accuracy is None or baseline.motion_accuracy is None:
        return {}
    gates = {
        f"content accuracy >= {GATE_ACCURACY}": (teacher.content_accuracy or 0.0) >= GATE_ACCURACY,
        f"motion accuracy >= {GATE_ACCURACY}": (teacher.motion_accuracy or 0.0) >= GATE_ACCURACY,
    }
    drops = []
    for score in scores:
        if score.name in GATE_BLOCKS:
            content, motion = score.quality.content_accuracy, score.quality.motion_accuracy
            assert content is not None
            assert motion is not None
            drops += [baseline.content_accuracy - content, baseline.motion_accuracy - motion]
    if drops:
        gates[f"bypassing {' or '.join(GATE_BLOCKS)} costs >= {HARMFUL_DROP} accuracy"] = max(drops) >= HARMFUL_DROP
    return gates


def sensitivity_table(report: SensitivityReport) -> str:
    """The report as a markdown table."""

    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.3f}"

    lines = [
        "| bypassed | content accuracy | motion accuracy | content distance | motion distance | parameters | "
        "GFLOPs | latency ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [("nothing", report.baseline, None)] + [(s.name, s.quality, s) for s in report.scores]
    for name, quality, score in rows:
        cost = (
            "| | | |"
            if score is None
            else (f"| {score.parameters / 1e6:.3f} M | {score.flops / 1e9:.3f} | {score.latency_ms:.2f} |")
        )
        lines.append(
            f"| {name} | {percent(quality.content_accuracy)} | {percent(quality.motion_accuracy)} "
            f"| {quality.content_distance:.2f} | {quality.motion_distance:.2f} {cost}"
        )
    gates = "; ".join(f"{name}: {'passed' if ok else 'failed'}" for name, ok in report.teacher_gates.items())
    return "\n".join([*lines, "", f"Teacher gates (N = {report.teacher.clips}): {gates or 'none'}"]) + "\n"
