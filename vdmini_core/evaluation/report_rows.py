"""HTML of the report's numbers: the three rows with intervals, pairs of clips, where the time goes."""

from collections.abc import Mapping, Sequence
from html import escape

from vdmini_core.artifacts import Corner, Estimate, EvaluationRow, Latency, Quality

NOT_AVAILABLE = "n/a"
DISTANCE = "Toy Frechet distance (own evaluator)"
WHOLE = "end_to_end"
MIN_RUNS = 30  # fewer make no ratio
# The template holds the table's head; these name the cells where a narrow screen shows rows as cards.
COST_COLUMNS = ("Parameters", "FLOPs", "Latency, median [p10–p90]", "Peak memory")
QUALITY_COLUMNS = {
    "clips": "Clips, N",
    "content_accuracy": "Content accuracy",
    "content_distance": f"{DISTANCE}, content",
    "motion_accuracy": "Motion accuracy",
    "motion_distance": f"{DISTANCE}, motion",
}
# Further measures, by what they tell about and how the page calls them; others are shown under their own names.
MEASURES = {
    "content": {
        "psnr": "PSNR, dB (higher is closer)",
        "ssim": "SSIM (1 is equal)",
        "lpips": "LPIPS (0 is equal)",
        "dreamsim": "DreamSim distance (0 is equal)",
        "feature_cosine": "Cosine of single frames' features (1 is equal)",
        "contrast_ratio": "Contrast, ratio to the teacher's",
        "content_precision": "Precision",
        "content_recall": "Recall",
        "content_diversity": "Diversity over seeds",
    },
    "motion": {
        "motion_cosine": "Cosine of motion features (1 is equal)",
        "flow_error": "End-point error of optical flow, pixels a frame",
        "flow_ratio": "Length of optical flow, ratio to the teacher's",
        "flicker_ratio": "Flicker, ratio to the teacher's",
        "motion_precision": "Precision",
        "motion_recall": "Recall",
        "motion_diversity": "Diversity over seeds",
    },
}
STAGES = {"encoder": "text or image encoder", "denoiser": "denoiser, all steps", "vae_decode": "VAE decode"}


def results_rows(rows: Mapping[str, EvaluationRow], floor: Quality) -> str:
    """The three rows and the floor; explicit roles keep it a table where CSS shows it as cards."""
    body = []
    for row in rows.values():
        cells = [*_costs(row, rows["teacher"]), *_quality(row.quality, row.intervals)]
        body.append(_row(row.name, "", "chosen" if row.name == "recovered" else "", cells))
    cells = ["", "", "", "", *_quality(floor, {})]
    body.append(_row("real versus real", "floor of the distances", "floor", cells))
    return "".join(body)


def _row(name: str, remark: str, style: str, cells: Sequence[str]) -> str:
    remark = f"<small>{escape(remark)}</small>" if remark else ""
    tds = "".join(
        f'<td role="cell" data-label="{label}" class="{"" if cell else "empty"}"><span>{cell or "–"}</span></td>'
        for label, cell in zip((*COST_COLUMNS, *QUALITY_COLUMNS.values()), cells, strict=True)
    )
    head = f'<th scope="row" role="rowheader">{escape(name)}{remark}</th>'
    return f'<tr role="row" class="{style}">{head}{tds}</tr>'


def _costs(row: EvaluationRow, teacher: EvaluationRow) -> list[str]:
    """Cells (HTML) of what the network costs, with ratios to the teacher.

    Memory has none: on the CPU it is the process's peak so far, which grows from row to row.
    """
    cells = (
        (scaled(row.parameters), row.parameters, teacher.parameters),
        (scaled(row.flops), row.flops, teacher.flops),
        (_milliseconds(row.latency), row.latency.median_ms, teacher.latency.median_ms),
    )
    texts = [t if row is teacher else f"{t}<small>{value / of:.2f}× teacher</small>" for t, value, of in cells]
    return [*texts, f"{row.peak_memory_bytes / 2**20:.4g} MiB"]


def _milliseconds(latency: Latency) -> str:
    return f"{latency.median_ms:.4g} ms <small>[{latency.p10_ms:.4g}–{latency.p90_ms:.4g}]</small>"


def _quality(quality: Quality, intervals: Mapping[str, Estimate]) -> list[str]:
    """Cells (HTML) in the order of QUALITY_COLUMNS, each with its interval where there is one."""
    return [_measure(name, getattr(quality, name), intervals.get(name)) for name in QUALITY_COLUMNS]


def _measure(name: str, value: float | None, estimate: Estimate | None) -> str:
    text = measure_text(name, value)
    if estimate is None or value is None:
        return text
    low, high = measure_text(name, estimate.low), measure_text(name, estimate.high)
    text += f" <small>[{low.removesuffix('%')}–{high}]</small>"
    if not name.endswith("accuracy"):
        return text
    side = name.removesuffix("_accuracy")
    places = f"--low: {estimate.low:.4f}; --high: {estimate.high:.4f}; --at: {value:.4f}"
    return f'{text}<i class="whisker {side}" style="{places}"></i>'


def measure_text(name: str, value: float | None) -> str:
    """A measure's value as text: accuracies in percent."""
    if value is None:
        return NOT_AVAILABLE
    if name.endswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:.4g}"


def scaled(value: int) -> str:
    """A count with its unit: 4 321 000 is 4.321 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return str(value)


def measures_table(rows: Mapping[str, EvaluationRow]) -> str:
    """What the main table has no column for, content and motion apart; empty where there is nothing."""
    names = {name: name.replace("_", " ") for row in rows.values() for name in row.intervals}
    known = {name for labels in MEASURES.values() for name in (*labels, *QUALITY_COLUMNS)}
    groups = {**MEASURES, "other": {name: label for name, label in names.items() if name not in known}}
    shown = [row for row in rows.values() if set(row.intervals) - set(QUALITY_COLUMNS)]
    if not shown:
        return ""
    head = "".join(f'<th scope="col">{escape(row.name)}</th>' for row in shown)
    body = []
    for kind, labels in groups.items():
        members = {name: label for name, label in labels.items() if name in names}
        if members:
            body.append(f'<tr><th scope="rowgroup" colspan="{len(shown) + 1}">{kind.capitalize()}</th></tr>')
        for name, label in members.items():
            cells = "".join(f"<td>{_estimate(row.intervals.get(name))}</td>" for row in shown)
            body.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    return (
        '<h3 id="measures">Clip by clip</h3>'
        '<p class="quiet">A student beside the teacher: clips from the same noise and condition. Precision and recall '
        "are against real clips. Brackets hold the 95% bootstrap interval over prompts.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="measures"><table class="measures">'
        f'<thead><tr><th scope="col">Measure</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:.4g} <small>[{estimate.low:.4g}–{estimate.high:.4g}]</small>"


def waterfall(rows: Mapping[str, EvaluationRow], corners: Sequence[Corner] = ()) -> str:
    """Where the time of one clip goes, before and after; empty where no stage was timed.

    Teacher above recovered student; with two decoders, the recovered student with each, the compressed one last.
    """
    timed = {name: rows[name].stages for name in ("teacher", "recovered") if rows[name].stages}
    timed |= {f"{c.denoiser}, {c.decoder} decoder": c.stages for c in corners if _last(c)}
    if not timed:
        return ""
    longest = max(max(_whole(stages), _sum(stages)) for stages in timed.values())
    models = "".join(_bars(name, stages, longest) for name, stages in timed.items())
    ratio = ""
    if len(timed) > 1 and all(part.runs >= MIN_RUNS for stages in timed.values() for part in stages.values()):
        *_, (name, after) = timed.items()
        student = "the recovered student" + (" with its compressed decoder" if name != "recovered" else "")
        share = _whole(after) / _whole(timed["teacher"])
        ratio = f" One clip of {student} takes {share:.2f} times as long as the teacher's."
    return (
        '<section aria-labelledby="time"><h2 id="time">Where the time of one clip goes</h2>'
        '<p class="quiet">Medians [p10–p90] of the parts, one after the other, all calls of the denoiser together.'
        f'{ratio}</p><div class="waterfalls">{models}</div></section>'
    )


def _last(corner: Corner) -> bool:
    """Whether both denoiser and decoder are the smaller ones."""
    return (corner.denoiser, corner.decoder) == ("recovered", "compressed")


def corners_section(corners: Sequence[Corner]) -> str:
    """{teacher, student denoiser} x {original, compressed decoder} as a table; empty without a second decoder."""
    if not corners:
        return ""
    heads = ("VAE decode", "One clip, end to end", "Content accuracy", "Motion accuracy", "Flicker, ratio")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = ""
    for corner in corners:
        cells = [
            _milliseconds(corner.stages["vae_decode"]),
            _milliseconds(corner.stages[WHOLE]),
            measure_text("accuracy", corner.quality.content_accuracy),
            measure_text("accuracy", corner.quality.motion_accuracy),
            f"{corner.flicker_ratio:.3f}",
        ]
        name = escape(f"{corner.denoiser}, {corner.decoder} decoder")
        body += f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    return (
        '<section aria-labelledby="corners"><h2 id="corners">Denoiser and decoder, before and after</h2>'
        '<p class="quiet">Each denoiser samples its latents once; both decoders show the same ones. '
        f"N = {corners[0].quality.clips}; times are medians of {corners[0].stages[WHOLE].runs} clips.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="corners"><table class="measures">'
        f'<thead><tr><th scope="col">Denoiser, decoder</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "</section>"
    )


def _sum(stages: Mapping[str, Latency]) -> float:
    return sum(latency.median_ms for name, latency in stages.items() if name != WHOLE)


def _whole(stages: Mapping[str, Latency]) -> float:
    return stages[WHOLE].median_ms if WHOLE in stages else _sum(stages)


def _bars(model: str, stages: Mapping[str, Latency], longest: float) -> str:
    items, start = [], 0.0
    for name, latency in stages.items():
        first = 0.0 if name == WHOLE else start
        start += 0.0 if name == WHOLE else latency.median_ms
        place = f"--from: {first / longest:.4f}; --share: {latency.median_ms / longest:.4f}"
        style = ' class="whole"' if name == WHOLE else ""
        label = escape(STAGES.get(name, name.replace("_", " ")))
        items.append(
            f"<li{style}><span>{label}</span><span>{_milliseconds(latency)}</span>"
            f'<i class="bar" style="{place}"></i></li>'
        )
    return f'<div><h3>{escape(model)}</h3><ul class="waterfall">{"".join(items)}</ul></div>'
