"""Teacher, prune-only and recovered student side by side: quality, size and speed on the same seeds."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vdmini_core.artifacts import Corner, EvaluationReport, EvaluationRow, Latency, Provenance, Quality, json_digest
from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.data.synthetic import COLOURS, MOTIONS, SHAPES
from vdmini_core.data.video import Frames, write_video
from vdmini_core.evaluation.collapse import ADVICE, collapses
from vdmini_core.evaluation.costs import RATIO_RUNS, count_costs, measure_latencies, speedup
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.evaluation.memory import peak_memory_bytes
from vdmini_core.evaluation.metrics.dynamics import DYNAMICS, dynamics
from vdmini_core.evaluation.quality import SMALLEST, Judged, compare, decoded_batches, judge
from vdmini_core.evaluation.side_by_side import (
    CORNERS,
    PAIRED_MEASURES,
    TEACHER,
    RowClips,
    estimates,
    generate_rows,
    ratios,
    with_decoder,
)
from vdmini_core.evaluation.stage_times import WHOLE, OneClip, measure_stages
from vdmini_core.models import Denoiser, Pipeline, load_denoiser
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import ClipAlarmSettings, EvaluateSettings

CLIP_FPS, CLIP_CRF = 8, 16
ALARM_KEY = "evaluate.alarms"
ROWS = ("teacher", "pruned", "recovered")


def evaluate_rows(
    pipeline: Pipeline,
    students: dict[str, Path],
    data: LatentCache,
    evaluator: Evaluator,
    settings: EvaluateSettings,
    clips_folder: Path,
    protocol: dict[str, Any],
    provenance: Provenance,
    track: Track = silent_track,
    vae: Path | None = None,
) -> EvaluationReport:
    """Evaluate the teacher and the students `pruned` and `recovered` (folders); writes gallery clips.

    `vae` is the folder of one with a compressed decoder: then the latents of teacher and recovered student are decoded
    by both, which makes the four corners.

    The reference is the first `settings.clips` test clips, the floor the next as many of them against
    the first, both as the VAE decodes them.
    """
    device = pipeline.device
    folders = {"teacher": pipeline.folder / pipeline.denoiser_folder(), **students}
    denoisers = {"teacher": pipeline.denoiser, **{name: load_denoiser(path, device) for name, path in students.items()}}
    rows_of_one = data.rows([0])
    latents, condition = rows_of_one["latents"].to(device), condition_of(rows_of_one, device)
    channels, frames, height, width = latents.shape[1:]
    clips_folder.mkdir(parents=True, exist_ok=True)

    shown: list[Tensor] = []  # dynamics of the real clips
    real = _seen_by(decoded_batches(pipeline, data, settings.clips, settings), shown)
    reference = judge(real, evaluator)
    other = judge(decoded_batches(pipeline, data, settings.clips, settings, first=settings.clips), evaluator)
    writers = {name: _first_clips(settings.gallery, partial(write_clip, clips_folder, name)) for name in ROWS}
    compressed = None if vae is None else with_vae(pipeline, vae)
    made = generate_rows(
        pipeline, denoisers, data, evaluator, settings, lambda name, clips: writers[name](clips), track, compressed
    )
    qualities = {name: compare(made[name].judged, reference) for name in ROWS}
    alarms = {name: row_alarms(name, made, torch.cat(shown), settings.alarms) for name in ROWS}
    gallery = _gallery(pipeline, data, settings, clips_folder)

    level = torch.zeros(1, device=device)
    calls: dict[str, Callable[[], object]] = {
        name: partial(denoiser, latents, level, condition) for name, denoiser in denoisers.items()
    }
    with torch.no_grad():
        latencies = measure_latencies(calls, device, runs=settings.latency_runs, warmup=settings.latency_warmup)
    stages = measure_stages(
        OneClip.of_latents(with_conditioner(pipeline), (channels, frames, height, width), settings.steps),
        denoisers | ({with_decoder(name): denoisers[name] for name in CORNERS} if compressed else {}),
        runs=settings.end_to_end_runs,
        warmup=1,
        decoding={with_decoder(name): compressed for name in CORNERS} if compressed else None,
    )
    memory = {name: peak_memory_bytes(folders[name], latents, condition) for name in ROWS}
    costs = {name: count_costs(denoisers[name], latents, condition) for name in ROWS}
    rows = tuple(
        EvaluationRow(
            name=name,
            parameters=costs[name].parameters,
            flops=costs[name].flops,
            latency=latencies[name],
            peak_memory_bytes=memory[name],
            quality=qualities[name],
            intervals=estimates(made[name], None if name == TEACHER else made[TEACHER], reference, settings.seed),
            stages=stages[name],
            alarms=alarms[name],
        )
        for name in ROWS
    )
    return EvaluationReport(
        protocol=protocol,
        protocol_digest=json_digest(protocol),
        rows=rows,
        floor=compare(other, reference),
        parameter_reduction=1 - costs["recovered"].parameters / costs["teacher"].parameters,
        flop_ratio=costs["recovered"].flops / costs["teacher"].flops,
        latency_ratio=latencies["recovered"].median_ms / latencies["teacher"].median_ms,
        recovery=recovery(qualities),
        gallery=gallery,
        corners=corners(pipeline, compressed, denoisers, made, reference, stages, settings.alarms)
        if compressed
        else (),
        provenance=provenance,
    )


def with_vae(pipeline: Pipeline, vae: Path) -> Pipeline:
    """The same denoiser with the VAE of a folder."""
    return type(pipeline)(pipeline.folder, {**pipeline.models, "vae": pipeline.load_part("vae", vae, pipeline.device)})


def corners(
    pipeline: Pipeline,
    compressed: Pipeline,
    denoisers: Mapping[str, Denoiser],
    made: Mapping[str, RowClips],
    reference: Judged,
    stages: Mapping[str, dict[str, Latency]],
    limits: ClipAlarmSettings,
) -> tuple[Corner, ...]:
    """{teacher, recovered} x {original, compressed decoder}, the teacher's own first."""
    flicker = DYNAMICS.index("flicker")
    shown = made[TEACHER].dynamics[:, flicker].mean().clamp_min(SMALLEST)
    found = []
    for name in CORNERS:
        for decoder, models, row in (("original", pipeline, name), ("compressed", compressed, with_decoder(name))):
            networks = denoisers[name].model, models.vae.decoder
            found.append(
                Corner(
                    denoiser=name,
                    decoder=decoder,
                    parameters=sum(p.numel() for network in networks for p in network.parameters()),
                    quality=compare(made[row].judged, reference),
                    flicker_ratio=float(made[row].dynamics[:, flicker].mean() / shown),
                    stages=stages[row],
                    alarms=decoder_alarms(name, made, limits) if decoder == "compressed" else {},
                )
            )
    return tuple(found)


def corners_table(found: Sequence[Corner]) -> list[str]:
    """The four corners as lines of markdown; ratios of latencies only from RATIO_RUNS runs on."""

    def share(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.3f}"

    lines = [
        "| denoiser | decoder | parameters of both | denoiser ms | VAE decode ms | end to end ms (p10-p90) | speed-up "
        "| content acc. | motion acc. | content distance | motion distance | flicker |",
        "|---" * 12 + "|",
    ]
    for corner in found:
        whole, q = corner.stages[WHOLE], corner.quality
        ratio = speedup(found[0].stages[WHOLE], whole)
        faster = "-" if ratio is None else f"{ratio:.2f}"
        lines.append(
            f"| {corner.denoiser} | {corner.decoder} | {corner.parameters / 1e6:.3f} M "
            f"| {corner.stages['denoiser'].median_ms:.1f} | {corner.stages['vae_decode'].median_ms:.1f} "
            f"| {whole.median_ms:.1f} ({whole.p10_ms:.1f}-{whole.p90_ms:.1f}) | {faster} "
            f"| {share(q.content_accuracy)} | {share(q.motion_accuracy)} | {q.content_distance:.2f} "
            f"| {q.motion_distance:.2f} | {corner.flicker_ratio:.3f} |"
        )
    lines += [f"\n**{alarm}**, {corner.denoiser}: {text}" for corner in found for alarm, text in corner.alarms.items()]
    runs = found[0].stages[WHOLE].runs
    note = f"Each denoiser's latents were sampled once and decoded by both decoders. Times: medians of {runs} clips"
    return [*lines, "", f"{note}{'' if runs >= RATIO_RUNS else f'; a speed-up needs {RATIO_RUNS}'}.", ""]


def _seen_by(batches: Iterable[tuple[Tensor, Tensor]], shown: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches as they come, their dynamics put on the list."""
    for clips, labels in batches:
        shown.append(dynamics(clips))
        yield clips, labels


def row_alarms(name: str, made: dict[str, RowClips], real: Tensor, limits: ClipAlarmSettings) -> dict[str, str]:
    """What is wrong with a row's clips: a student's beside the teacher's, the teacher's beside real ones.

    `real` are the dynamics [N, 3] of real clips.
    """
    if name == TEACHER:
        whose = ("the teacher's", "real ones")
        found = collapses(ratios(made[name].dynamics, real), limits, ALARM_KEY, *whose)
        return {
            alarm: f"{fact}; no student can be trusted to be better: take another teacher"
            for alarm, fact in found.items()
        }
    beside = ratios(made[name].dynamics, made[TEACHER].dynamics)
    found = collapses(beside, limits, ALARM_KEY, f"the {name} student's")
    return {alarm: f"{fact}; {ADVICE[alarm]}" for alarm, fact in found.items()}


def decoder_alarms(name: str, made: Mapping[str, RowClips], limits: ClipAlarmSettings) -> dict[str, str]:
    """What is wrong with the clips of a denoiser, by the compressed decoder, beside the same by the original one."""
    beside = ratios(made[with_decoder(name)].dynamics, made[name].dynamics)
    found = collapses(beside, limits, ALARM_KEY, "the compressed decoder's", "the original one's")
    advice = "raise decoder.ratio, or train it longer (decoder.loop.max_steps)"
    return {alarm: f"{fact}; {advice}" for alarm, fact in found.items()}


def with_conditioner(pipeline: Pipeline) -> Pipeline:
    """The same with its encoders, which nothing but timing needs here."""
    encoders = type(pipeline).load(pipeline.folder, ("conditioner",), pipeline.device)
    return type(pipeline)(pipeline.folder, {**pipeline.models, **encoders.models})


def recovery(qualities: dict[str, Quality]) -> dict[str, float | None]:
    """Share of the gap that pruning opened and recovery closed, per measure: 1 is all of it.

    None where there is no accuracy, or where pruning opened no gap.
    """
    found: dict[str, float | None] = {}
    for measure in ("content_accuracy", "motion_accuracy", "content_distance", "motion_distance"):
        teacher, pruned, recovered = (getattr(qualities[name], measure) for name in ROWS)
        worse = None if teacher is None else (teacher - pruned) * (1 if "accuracy" in measure else -1)
        if worse is None or worse <= 0:
            found[measure] = None
        else:
            found[measure] = (recovered - pruned) / (teacher - pruned)
    return found


def to_frames(clip: Tensor) -> Frames:
    """Clip [3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    return np.asarray(((clip.permute(1, 2, 3, 0).cpu() + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def write_clip_to(target: Path, clip: Tensor) -> None:
    """Write a clip [3, T, H, W] in [-1, 1] as H.264; whole or absent."""
    draft = target.with_name(f".{target.stem}.partial{target.suffix}")
    write_video(draft, to_frames(clip), fps=CLIP_FPS, codec="libx264", crf=CLIP_CRF, container="mp4")
    draft.replace(target)


def write_clip(folder: Path, name: str, index: int, clip: Tensor) -> None:
    """Write one gallery clip."""
    write_clip_to(folder / f"{name}-{index}.mp4", clip)


def _first_clips(count: int, write: Callable[[int, Tensor], None]) -> Callable[[Tensor], None]:
    """A receiver of batches that passes on the first `count` clips with their index."""
    seen = 0

    def keep(clips: Iterable[Tensor]) -> None:
        nonlocal seen
        for clip in clips:
            if seen < count:
                write(seen, clip)
            seen += 1

    return keep


def _gallery(
    pipeline: Pipeline, data: LatentCache, settings: EvaluateSettings, folder: Path
) -> tuple[dict[str, str], ...]:
    entries = []
    one_by_one = settings.model_copy(update={"batch_size": 1})
    for index, (clips, labels) in enumerate(decoded_batches(pipeline, data, settings.gallery, one_by_one)):
        write_clip(folder, "real", index, clips[0])
        Image.fromarray(to_frames(clips[0])[0]).save(folder / f"first-{index}.png")
        entry = {"first frame": f"first-{index}.png"}
        entry |= {name: f"{name}-{index}.mp4" for name in ("real", *ROWS)}
        if (labels >= 0).all():
            shape, colour, motion = labels[0].tolist()
            entry["caption"] = f"{list(COLOURS)[colour]} {SHAPES[shape]}, {MOTIONS[motion]}"
        entries.append(entry)
    return tuple(entries)


def summary(report: EvaluationReport) -> str:
    """The three rows as a markdown table with a closing line."""

    def share(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.3f}"

    lines = [
        f"| N = {report.floor.clips} | parameters | GFLOPs | latency ms (p10-p90) | content acc. | motion acc. "
        "| content distance | motion distance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        q, t = row.quality, row.latency
        lines.append(
            f"| {row.name} | {row.parameters / 1e6:.3f} M | {row.flops / 1e9:.3f} | {t.median_ms:.1f} "
            f"({t.p10_ms:.1f}-{t.p90_ms:.1f}) | {share(q.content_accuracy)} | {share(q.motion_accuracy)} "
            f"| {q.content_distance:.2f} | {q.motion_distance:.2f} |"
        )
    f = report.floor
    lines.append(
        f"| real against real | | | | {share(f.content_accuracy)} | {share(f.motion_accuracy)} "
        f"| {f.content_distance:.2f} | {f.motion_distance:.2f} |"
    )
    lines += ["", *(corners_table(report.corners) if report.corners else [])]
    lines += [*(f"- **{name}**: {text}" for row in report.rows for name, text in row.alarms.items())]
    if pairs := [row for row in report.rows if set(row.intervals) & set(PAIRED_MEASURES)]:
        names = [name for name in PAIRED_MEASURES if name in pairs[0].intervals]
        lines += [f"| beside the teacher's clips | {' | '.join(name.replace('_', ' ') for name in names)} |"]
        lines += ["|" + "---|" * (len(names) + 1)]
        for row in pairs:
            cells = [f"{e.value:.3g} ({e.low:.3g} to {e.high:.3g})" for e in (row.intervals[name] for name in names)]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
    closed = ", ".join(f"{k.replace('_', ' ')} {share(v)}" for k, v in report.recovery.items())
    lines += [
        "",
        f"{report.parameter_reduction:.1%} fewer U-Net parameters, {report.flop_ratio:.3f} of the FLOPs, "
        f"{report.latency_ratio:.3f} of the latency (median of {report.rows[0].latency.runs}). "
        f"Share of the gap closed: {closed}. Distances are toy Frechet distances of the offline evaluator, "
        "comparable with nothing published. Intervals are 95%, over clips (BCa bootstrap).",
    ]
    return "\n".join(lines) + "\n"


def flat_metrics(report: EvaluationReport) -> dict[str, float]:
    """Headline figures under the vocabulary that every stage and model shares."""
    metrics = {
        "size/unet_parameter_reduction": report.parameter_reduction,
        "speed/flop_ratio": report.flop_ratio,
        "speed/latency_ratio": report.latency_ratio,
    }
    metrics |= {f"recovery/{k}": v for k, v in report.recovery.items() if v is not None}
    for row in report.rows:
        metrics |= {f"quality/{k}/{row.name}": v for k, v in row.quality if isinstance(v, float)}
        for measure, estimate in row.intervals.items():
            group = "paired" if measure in PAIRED_MEASURES else "quality"
            metrics[f"{group}/{measure}/{row.name}"] = estimate.value
        metrics |= {f"speed/stage_ms/{stage}/{row.name}": t.median_ms for stage, t in row.stages.items()}
        metrics[f"quality/alarms/{row.name}"] = float(len(row.alarms))
        metrics |= {
            f"speed/latency_ms/{row.name}": row.latency.median_ms,
            f"speed/flops/{row.name}": float(row.flops),
            f"size/unet_parameters/{row.name}": float(row.parameters),
        }
    for corner in report.corners:
        place = f"{corner.denoiser}_{corner.decoder}"
        metrics |= {f"corner/{k}/{place}": v for k, v in corner.quality if isinstance(v, float)}
        metrics |= {f"corner/{stage}_ms/{place}": t.median_ms for stage, t in corner.stages.items()}
    return metrics
