"""What every block and R-A pair is worth: bypass it, generate, and judge content and motion.

Paper, Figs. 1 and A4-A6, with two judges instead of one FVD: content and motion apart; and with pairs of clips, the
intact teacher's and those without the unit from the same noise, instead of sets alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from vdmini_core.artifacts import (
    Estimate,
    Provenance,
    Quality,
    SensitivityReport,
    UnitScore,
    json_digest,
)
from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.evaluation.costs import Costs, count_costs, flops_without, measure_units
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.evaluation.metrics.paired import PAIRED, estimate, motion_share
from vdmini_core.evaluation.quality import Judged, compare, decoded_batches, generated_batches, judge
from vdmini_core.models import Condition, Denoiser, Pipeline
from vdmini_core.models.graph import expand
from vdmini_core.models.shared_start import find_cuts
from vdmini_core.pruning.calibration import calibrate, fit_stand_ins
from vdmini_core.pruning.criteria import Scores, criteria_of
from vdmini_core.pruning.sweep import INTACT, NO_OP, Sweep, judged
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import SensitivitySettings

GATE_ACCURACY = 0.9
GATE_BLOCKS = ("D.2", "U.1")
HARMFUL_DROP = 0.1
DAMAGES = ("content", "motion")


class Sensitivity:
    """A sensitivity analysis on clips that nothing else uses: first those for calibration, then those for the sweep.

    `scratch` is where measured rounds are kept, so that a run that was cut off, or other processes, need not measure
    them again; its name should say what they depend on. `measure` is what such a process calls.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        data: LatentCache,
        evaluator: Evaluator,
        settings: SensitivitySettings,
        *,
        scratch: Path | None = None,
        track: Track = silent_track,
    ) -> None:
        self.pipeline, self.data, self.evaluator, self.settings, self.track = pipeline, data, evaluator, settings, track
        self.denoiser = pipeline.denoiser
        self.first = settings.calibration_clips
        needed = self.first + 2 * settings.clips
        if len(data) < needed:
            raise ValueError(
                f"{len(data)} training clips are encoded; sensitivity needs {needed}: calibration_clips "
                f"{settings.calibration_clips}, and twice clips {settings.clips}, the second time for the distance of "
                "real clips from each other; set encode.train_clips to that, or lower sensitivity.clips"
            )
        rows = data.rows([self.first])
        self.latents: Tensor = rows["latents"].to(pipeline.device)
        self.condition: Condition = condition_of(rows, pipeline.device)
        self.calibration = calibrate(pipeline, data, self.first, settings.batch_size, settings.seed)
        self.stand_ins = fit_stand_ins(self.denoiser, self.calibration)
        bypasses = [(name,) for group in self.groups for name in group]
        cuts = find_cuts(self.denoiser, bypasses, self.latents, self.condition, self.stand_ins)
        self.cuts = {name: cut for (name,), cut in cuts.items()}
        self.sweep = Sweep(
            pipeline, data, evaluator, settings, self.cuts, first=self.first, folder=scratch, track=track
        )

    @property
    def groups(self) -> tuple[list[str], list[str]]:
        """Blocks, and pairs; a block of a single unit (the mid block, a transformer's) is scored once, as a block."""
        return groups_of(self.denoiser)

    def measure(self, units: Sequence[str], round_: int) -> None:
        """Measure one round of the named units or blocks; `report` finds it in the same `scratch`."""
        if unknown := sorted(set(units) - self.cuts.keys()):
            raise ValueError(f"there is no unit {', '.join(unknown)}; there are {', '.join(self.cuts)}")
        self.sweep.measure(round_, units)

    def open_units(self, round_: int) -> list[str]:
        """What is to be measured in a round, once the rounds before it are there."""
        return self.sweep.open_in(round_, self.groups, always=GATE_BLOCKS)

    def report(self, protocol: dict[str, Any], provenance: Provenance) -> SensitivityReport:
        """Measure what is missing, and judge it all."""
        settings, sweep = self.settings, self.sweep
        costs = count_costs(self.denoiser, self.latents, self.condition)
        latency = measure_units(self.denoiser, self.latents, self.condition, runs=settings.latency_runs)
        guesses = criteria_of(self.denoiser, self.calibration, self.cuts, settings.seed)
        sweep.run(self.groups, always=GATE_BLOCKS)
        intact = judged(sweep.measured(INTACT))
        teacher, real = self._on_more_clips(intact)
        reference = real.first(settings.clips)
        other = decoded_batches(self.pipeline, self.data, settings.clips, settings, self.first + settings.clips)
        baselines: dict[int, Quality] = {}
        scores = []
        for group, kind in zip(self.groups, ("block", "pair"), strict=True):
            for name in group:
                score = self._score(name, kind, costs, latency, guesses, reference)
                scores.append(score)
                count = score.quality.clips
                baselines.setdefault(count, compare(intact.first(count), reference))
        baseline = compare(intact, reference)
        singles = [score for score in scores if score.name in {unit.name for unit in self.denoiser.units}]
        return SensitivityReport(
            protocol=protocol,
            protocol_digest=json_digest(protocol),
            teacher=compare(teacher, real),
            baseline=baseline,
            floor=compare(judge(other, self.evaluator), reference),
            scores=tuple(scores),
            teacher_gates=teacher_gates(compare(teacher, real), baselines | {baseline.clips: baseline}, scores),
            baselines=tuple(baselines[count] for count in sorted(baselines) if count != baseline.clips),
            controls=self._controls(singles),
            correlations=correlations(singles),
            **self.flops(costs),
            provenance=provenance,
        )

    def _score(
        self,
        name: str,
        kind: str,
        costs: Costs,
        latency: Mapping[str, float],
        guesses: Mapping[str, Scores],
        reference: Judged,
    ) -> UnitScore:
        members = expand([name], self.denoiser.units)
        found = self.sweep.measured(name)
        estimates = {m: estimate(found[m].numpy(), self.settings.seed, self.settings.confidence) for m in PAIRED}
        return UnitScore(
            name=name,
            kind=kind,
            depth=next(u.depth for u in self.denoiser.units if u.name == members[0]),
            parameters=sum(costs.unit_parameters[m] for m in members),
            flops=sum(costs.unit_flops[m] for m in members),
            latency_ms=sum(latency[m] for m in members),
            quality=compare(judged(found), reference),
            content=estimates.pop("content"),
            motion=estimates.pop("motion"),
            criteria={criterion: sum(of[m] for m in members) for criterion, of in guesses.items()},
            paired=estimates,
            replaced=tuple(m for m in members if m in self.stand_ins),
        )

    def _on_more_clips(self, intact: Judged) -> tuple[Judged, Judged]:
        """The intact teacher on `gate_clips` clips, or all there are, and as many real ones."""
        settings = self.settings
        count = max(settings.clips, min(settings.gate_clips, len(self.data) - self.first))
        real = judge(decoded_batches(self.pipeline, self.data, count, settings, self.first), self.evaluator)
        if count == settings.clips:
            return intact, real
        more = generated_batches(
            self.pipeline,
            self.denoiser,
            self.data,
            settings.model_copy(update={"clips": count - settings.clips}),
            self.track,
            "intact teacher",
            first=self.first + settings.clips,
            noise_from=settings.clips,
        )
        return intact.joined(judge(more, self.evaluator)), real

    def _controls(self, units: Sequence[UnitScore]) -> dict[str, dict[str, Estimate]]:
        """Nothing bypassed, which does no damage; and a unit drawn at random, with an interval over the units."""
        nothing = self.sweep.measured(NO_OP)
        chance = {m: [getattr(unit, m).value for unit in units] for m in DAMAGES}
        return {
            NO_OP: {m: estimate(nothing[m].numpy(), self.settings.seed) for m in DAMAGES},
            "random unit": {m: estimate(values, self.settings.seed) for m, values in chance.items()},
        }

    def flops(self, costs: Costs) -> dict[str, int]:
        """What the sweep's calls of the denoiser took, what they would have taken, and what the criteria took."""
        settings = self.settings
        spent = naive = settings.clips * settings.steps * costs.flops
        no_op = len(self.sweep.measured(NO_OP)["content"])
        full, shortened = self.sweep.measured(NO_OP)["calls"].tolist()
        spent += no_op * (full + shortened) * costs.flops
        guessing = 2 + 3 + 1  # calls a clip: for the maps and block influence, Taylor (backward: 2 forward), output MSE
        criteria = guessing * settings.calibration_clips * costs.flops
        for name, cut in self.cuts.items():
            whole, suffix = flops_without(self.denoiser, costs, cut)
            found = self.sweep.measured(name)
            calls, shorter_calls = found["calls"].tolist()
            spent += len(found["content"]) * (calls * whole + shorter_calls * suffix)
            naive += settings.clips * settings.steps * whole
            if name in {unit.name for unit in self.denoiser.units}:
                criteria += settings.calibration_clips * suffix
        return {"forward_flops": spent, "naive_forward_flops": naive, "criteria_flops": criteria}


def groups_of(denoiser: Denoiser) -> tuple[list[str], list[str]]:
    """Blocks, and pairs within larger blocks."""
    return list(denoiser.blocks), [unit.name for unit in denoiser.units if unit.name != unit.block]


def correlations(units: Sequence[UnitScore]) -> dict[str, dict[str, float]]:
    """Spearman's, over single units, of each criterion and of depth with the measured damages.

    For depth also with motion's share of the damage, over units that do some: does motion matter more the deeper a
    unit lies? What is constant has none and is left out.
    """
    measured = {m: [getattr(unit, m).value for unit in units] for m in DAMAGES}
    guesses = {name: [unit.criteria[name] for unit in units] for name in (units[0].criteria if units else ())}
    found = {name: _spearman(values, measured) for name, values in guesses.items()}
    found["depth"] = _spearman([unit.depth for unit in units], measured)
    shares = {unit.name: share for unit in units if (share := motion_share(unit)) is not None}
    depths = [unit.depth for unit in units if unit.name in shares]
    return found | {"depth": found["depth"] | _spearman(depths, {"motion_share": list(shares.values())})}


def _spearman(values: Sequence[float], others: Mapping[str, Sequence[float]]) -> dict[str, float]:
    varied = {name: of for name, of in others.items() if len(set(of)) > 1 and len(set(values)) > 1}
    return {name: float(spearmanr(np.asarray(values), np.asarray(of)).statistic) for name, of in varied.items()}


def teacher_gates(teacher: Quality, baselines: Mapping[int, Quality], scores: Sequence[UnitScore]) -> dict[str, bool]:
    """Whether the teacher is fit for conclusions about blocks; empty where clips carry no labels.

    Accuracies of at least 0.9 (`teacher`), and a drop from the baseline of as many clips of at least 0.1 in content
    or motion accuracy without D.2 or without U.1: somewhere deep there must be something to lose.
    """
    if teacher.content_accuracy is None or teacher.motion_accuracy is None:
        return {}
    gates = {
        f"content accuracy >= {GATE_ACCURACY}": teacher.content_accuracy >= GATE_ACCURACY,
        f"motion accuracy >= {GATE_ACCURACY}": teacher.motion_accuracy >= GATE_ACCURACY,
    }
    drops = []
    for score in scores:
        if score.name in GATE_BLOCKS:
            whole, without = baselines[score.quality.clips], score.quality
            for before, after in (
                (whole.content_accuracy, without.content_accuracy),
                (whole.motion_accuracy, without.motion_accuracy),
            ):
                assert before is not None
                assert after is not None
                drops.append(before - after)
    if drops:
        gates[f"bypassing {' or '.join(GATE_BLOCKS)} costs >= {HARMFUL_DROP} accuracy"] = max(drops) >= HARMFUL_DROP
    return gates


def sensitivity_table(report: SensitivityReport) -> str:
    """The report as a markdown page: a row a unit, then controls, correlations and what it cost."""

    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.3f}"

    def interval(e: Estimate) -> str:
        return f"{e.value:.2g} ({e.low:.2g} to {e.high:.2g})"

    def judgements(q: Quality) -> str:
        accuracies = f"{percent(q.content_accuracy)} | {percent(q.motion_accuracy)}"
        return f"{accuracies} | {q.content_distance:.2f} | {q.motion_distance:.2f} | {q.clips}"

    lines = [
        "| bypassed | content damage | motion damage | content accuracy | motion accuracy | content distance "
        "| motion distance | N | parameters | GFLOPs | latency ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for quality in (report.baseline, *reversed(report.baselines)):
        lines.append(f"| nothing | | | {judgements(quality)} | | | |")
    for s in report.scores:
        lines.append(
            f"| {s.name}{' (a linear map in place)' if s.replaced else ''} | {interval(s.content)} "
            f"| {interval(s.motion)} | {judgements(s.quality)} | {s.parameters / 1e6:.3f} M "
            f"| {s.flops / 1e9:.3f} | {s.latency_ms:.2f} |"
        )
    for name, damages in report.controls.items():
        lines.append(
            f"| {name} (control) | {interval(damages['content'])} | {interval(damages['motion'])} |" + " |" * 8
        )
    lines += ["", "| Spearman's correlation over units with | content damage | motion damage |", "|---|---|---|"]
    for name, found in report.correlations.items():
        lines.append(f"| {name} | {percent(found.get('content'))} | {percent(found.get('motion'))} |")
    share = report.correlations.get("depth", {}).get("motion_share")
    gates = "; ".join(f"{name}: {'passed' if ok else 'failed'}" for name, ok in report.teacher_gates.items())
    notes = (
        "Damages are 1 - cosine of the evaluator's features, of single frames and of the motion, between a clip and "
        "the intact teacher's from the same noise; in brackets the bootstrap interval over prompts. Where N is smaller "
        "a unit was decided early: compare its set-level figures with `nothing` at the same N.",
        f"Motion's share of the damage and depth correlate by {percent(share)}, over units that do any.",
        f"The sweep took {report.forward_flops / 1e12:.2f} TFLOPs of the denoiser, "
        f"{report.forward_flops / max(report.naive_forward_flops, 1):.3f} of a sweep with all clips for every unit "
        f"from the start; criteria and fits another {report.criteria_flops / 1e12:.2f}.",
        f"Teacher gates (N = {report.teacher.clips}): {gates or 'none'}",
    )
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"
