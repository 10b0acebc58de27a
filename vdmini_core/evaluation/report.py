"""Writes the evaluation as one self-contained HTML page: verdict, table, clips, plan, sensitivity, training."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from vdmini_core.artifacts import EvaluationReport, EvaluationRow, Plan, Provenance, Quality, SensitivityReport
from vdmini_core.evaluation.plots import inline_svg, plan_row, training_figures
from vdmini_core.evaluation.report_clips import gallery_row
from vdmini_core.evaluation.report_rows import (
    NOT_AVAILABLE,
    corners_section,
    measure_text,
    measures_table,
    results_rows,
    scaled,
    waterfall,
)
from vdmini_core.evaluation.sensitivity_plots import depth_figure, sensitivity_figure

TITLE = "What pruning took and recovery gave back"
ROWS = ("teacher", "pruned", "recovered")


def write_report(
    target: Path,
    evaluation: EvaluationReport,
    sensitivity: SensitivityReport,
    plan: Plan,
    clips: Path,
    training: list[dict[str, float]] | None,
) -> None:
    """Write the page to `target`, whole or not at all.

    `evaluation.gallery` names files relative to the folder `clips`; they are embedded. A missing one
    raises FileNotFoundError. Ratios are computed from the rows, so the page cannot contradict its table.
    """
    page = Template(resources.files("vdmini_core.evaluation").joinpath("report.html").read_text("utf-8"))
    rows = _named_rows(evaluation)
    text = page.substitute(
        title=TITLE,
        verdict=escape(verdict(evaluation)),
        byline=_byline(evaluation),
        warning=_warning(sensitivity) + _alarms(rows),
        tiles=_tiles(rows, evaluation.recovery),
        rows=results_rows(rows, evaluation.floor),
        measures=measures_table(rows),
        waterfall=waterfall(rows, evaluation.corners) + corners_section(evaluation.corners),
        chance=escape(_chance_note([row.quality for row in evaluation.rows])),
        protocol=escape(evaluation.protocol_digest),
        gallery="".join(gallery_row(index, entry, clips) for index, entry in enumerate(evaluation.gallery, 1)),
        plan=_plan(plan, sensitivity),
        sensitivity=_sensitivity(sensitivity, plan),
        training=_training(training or []),
        provenance=_provenance(evaluation, sensitivity, plan),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.partial")
    draft.write_text(text, "utf-8")
    os.replace(draft, target)


def verdict(evaluation: EvaluationReport) -> str:
    """One plain-text sentence that holds only what the rows and the recovery shares say."""
    rows = _named_rows(evaluation)
    teacher, student = rows["teacher"], rows["recovered"]
    saved = 1 - student.parameters / teacher.parameters
    size = f"{abs(saved):.1%} {'fewer' if saved >= 0 else 'more'} parameters"
    ratio = student.latency.median_ms / teacher.latency.median_ms
    speed = f"one network call takes {ratio:.2f} times the teacher's median latency"
    if student.latency.p90_ms >= teacher.latency.p10_ms and teacher.latency.p90_ms >= student.latency.p10_ms:
        speed += " (the p10–p90 ranges overlap, so no difference in speed is shown)"
    shares = [_share_phrase(_recovery_name(key), share) for key, share in evaluation.recovery.items()]
    gap = f"of the gap that pruning opened, recovery closed {_join(shares)}" if shares else "no recovery was measured"
    return f"The recovered student has {size} than the teacher, {speed}, and {gap}."


def _share_phrase(name: str, share: float | None) -> str:
    if share is None:
        return f"{NOT_AVAILABLE} in {name} (no measured gap)"
    if share < 0:
        return f"none in {name} (the gap widened by {-share:.0%})"
    return f"{share:.0%} in {name}"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _recovery_name(key: str) -> str:
    return key.replace("_", " ").replace("distance", "toy Frechet distance")


def _named_rows(evaluation: EvaluationReport) -> dict[str, EvaluationRow]:
    rows = {row.name: row for row in evaluation.rows}
    if tuple(rows) != ROWS:
        raise ValueError(f"the evaluation holds the rows {', '.join(rows) or '(none)'}; expected {', '.join(ROWS)}")
    return rows


def _byline(evaluation: EvaluationReport) -> str:
    source = evaluation.provenance
    changes = " with uncommitted changes" if source.dirty else ""
    return escape(f"{source.created} · commit {source.commit[:12]}{changes} · {source.machine}")


def _warning(sensitivity: SensitivityReport) -> str:
    failed = [name for name, passed in sensitivity.teacher_gates.items() if not passed]
    if not failed:
        return ""
    return (
        '<div class="warning" role="note"><p><strong>teacher inadequate for conclusions about blocks</strong>: '
        f"failed: {escape('; '.join(failed))}.</p></div>"
    )


def _alarms(rows: Mapping[str, EvaluationRow]) -> str:
    texts = [
        f"<p><strong>{escape(row.name)}</strong>: {escape(text)}.</p>"
        for row in rows.values()
        for text in row.alarms.values()
    ]
    return f'<div class="warning" role="note">{"".join(texts)}</div>' if texts else ""


def _tiles(rows: Mapping[str, EvaluationRow], recovery: Mapping[str, float | None]) -> str:
    teacher, student = rows["teacher"], rows["recovered"]
    tiles = [
        (f"{student.parameters / teacher.parameters - 1:+.1%}".replace("-", "−"), "parameters, against the teacher"),
        (f"{student.latency.median_ms / teacher.latency.median_ms:.2f}×", "the teacher's median latency"),
    ]
    for key, share in recovery.items():
        value = NOT_AVAILABLE if share is None else f"{share:.0%}".replace("-", "−")
        tiles.append((value, f"of the gap in {_recovery_name(key)} closed by recovery"))
    return "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for value, what in tiles)


def _chance_note(qualities: Sequence[Quality]) -> str:
    """What the accuracies mean, and what chance alone does to them for the smallest N."""
    if all(q.content_accuracy is None and q.motion_accuracy is None for q in qualities):
        return f"Accuracies are {NOT_AVAILABLE}: these clips carry no labels the evaluator knows."
    clips = min(quality.clips for quality in qualities)
    half_width = 196 * math.sqrt(0.25 / clips)
    return (
        "Content is right where the shape, its colour and the beacon in the background all are. "
        f"With N = {clips}, chance alone moves an accuracy of 50% by ±{half_width:.1f} points (95% interval)."
    )


def _plan(plan: Plan, sensitivity: SensitivityReport) -> str:
    drawing = plan_row(plan, {score.name: score.depth for score in sensitivity.scores})
    return (
        f"<p>The plan ({escape(plan.method)}) removes {len(plan.removed)} of {len(plan.removed) + len(plan.kept)} "
        f"units: {scaled(plan.teacher_parameters)} → {scaled(plan.student_parameters)} parameters, "
        f"{scaled(plan.teacher_flops)} → {scaled(plan.student_flops)} FLOPs. "
        f"Removed units are struck out.</p>{drawing}"
    )


def _sensitivity(report: SensitivityReport, plan: Plan) -> str:
    description = "Bars per block and per pair: damage to content and motion when bypassed, parameters, latency."
    figure = inline_svg(sensitivity_figure(report, plan.removed), "sensitivity", description)
    against = inline_svg(depth_figure(report), "depth", "Damage to content and to motion against depth.")
    base, teacher = report.baseline, report.teacher
    judged = (
        f"On {teacher.clips} clips: content {_percent(teacher.content_accuracy)}, "
        f"motion {_percent(teacher.motion_accuracy)}."
    )
    gates = "; ".join(f"{name}: {'passed' if ok else 'failed'}" for name, ok in report.teacher_gates.items())
    return (
        "<p>Each unit of the intact teacher is bypassed alone, without training. Damage is how far a clip moves from "
        "the teacher's own of the same noise: 1 - cosine of the own evaluator's features of single frames (content) "
        "and of the motion, with the bootstrap interval over prompts; higher is worse, 0 is no change. "
        f"The teacher itself on these {base.clips} clips: content {_percent(base.content_accuracy)}, "
        f"motion {_percent(base.motion_accuracy)} right.</p>"
        f'<div class="plot wide scroll" tabindex="0" role="region" aria-label="Sensitivity plot">{figure}</div>'
        f'<div class="plot wide scroll" tabindex="0" role="region" aria-label="Depth plot">{against}</div>'
        f'<p class="quiet">Teacher gates: {escape(gates) or "none recorded"}. {judged} '
        f"{escape(_chance_note([base]))}</p>"
        f"<details><summary>The same as a table</summary>{_scores_table(report)}</details>"
    )


def _scores_table(report: SensitivityReport) -> str:
    """A row a unit; those with fewer clips were decided early."""
    judged = ("Clips, N", "Content accuracy", "Motion accuracy", "Content distance", "Motion distance")
    headings = ("Unit", "Content damage", "Motion damage", *judged, "Parameters", "Latency")
    head = "".join(f'<th scope="col">{name}</th>' for name in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(score.name)}</th>'
        + "".join(
            f"<td>{e.value:.2g} <small>[{e.low:.2g}–{e.high:.2g}]</small></td>" for e in (score.content, score.motion)
        )
        + "".join(f"<td>{cell}</td>" for cell in _quality(score.quality))
        + f"<td>{scaled(score.parameters)}</td><td>{score.latency_ms:.4g} ms</td></tr>"
        for score in report.scores
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Sensitivity table">{table}</div>'


def _quality(quality: Quality) -> list[str]:
    return [
        str(quality.clips),
        _percent(quality.content_accuracy),
        _percent(quality.motion_accuracy),
        f"{quality.content_distance:.4g}",
        f"{quality.motion_distance:.4g}",
    ]


def _percent(value: float | None) -> str:
    return measure_text("accuracy", value)


def _training(records: Sequence[Mapping[str, float]]) -> str:
    curves = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<div class="plot">{inline_svg(figure, f"curve{index}", f"{title}, over the training steps")}</div></figure>'
        for index, (title, figure) in enumerate(training_figures(records).items())
    )
    if not curves:
        return ""
    return (
        '<section aria-labelledby="training"><h2 id="training">Recovery training</h2>'
        '<p class="quiet">Losses as logged; the thick line is a running mean. Adversarial losses need not fall.</p>'
        f'<div class="curves">{curves}</div></section>'
    )


def _provenance(evaluation: EvaluationReport, sensitivity: SensitivityReport, plan: Plan) -> str:
    """Folded facts: who made each result, from what, under which protocol."""
    parts: dict[str, tuple[Provenance, dict[str, Any]]] = {
        "Evaluation": (evaluation.provenance, _protocol(evaluation)),
        "Sensitivity": (sensitivity.provenance, _protocol(sensitivity)),
        "Plan": (plan.provenance, {"report digest": plan.report_digest, "teacher digest": plan.teacher_digest}),
    }
    return "".join(
        f"<details><summary>{name}</summary>{_facts({**facts, **source.model_dump(mode='json')})}</details>"
        for name, (source, facts) in parts.items()
    )


def _protocol(report: EvaluationReport | SensitivityReport) -> dict[str, Any]:
    return {"protocol digest": report.protocol_digest, "protocol": report.protocol}


def _facts(facts: Mapping[str, Any]) -> str:
    rows = []
    for name, value in facts.items():
        nested = isinstance(value, dict | list)
        shown = (
            f"<pre>{escape(json.dumps(value, indent=1, ensure_ascii=False))}</pre>" if nested else escape(str(value))
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th><td>{shown}</td></tr>')
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'
