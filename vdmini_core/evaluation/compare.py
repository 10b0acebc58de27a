"""Teacher, prune-only and recovered student side by side: quality, size and speed on the same seeds."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vdmini_core.artifacts import EvaluationReport, EvaluationRow, Provenance, Quality, json_digest
from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.data.synthetic import COLOURS, MOTIONS, SHAPES
from vdmini_core.data.video import Frames, write_video
from vdmini_core.evaluation.costs import count_costs, measure_latencies
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.evaluation.memory import peak_memory_bytes
from vdmini_core.evaluation.quality import compare, decoded_batches, generated_batches, judge
from vdmini_core.models import Pipeline, load_denoiser
from vdmini_core.reporting import Track, silent_track
from vdmini_core.settings import EvaluateSettings

CLIP_FPS, CLIP_CRF = 8, 16
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
) -> EvaluationReport:
    """Evaluate the teacher and the students `pruned` and `recovered` (folders); writes gallery clips.

    The reference is the first `settings.clips` test clips, the floor the next as many of them against
    the first, both as the VAE decodes them.
    """
    device = pipeline.device
    folders = {"teacher": pipeline.folder / pipeline.denoiser_folder(), **students}
    denoisers = {"teacher": pipeline.denoiser, **{name: load_denoiser(path, device) for name, path in students.items()}}
    rows_of_one = data.rows([0])
    latents, condition = rows_of_one["latents"].to(device), condition_of(rows_of_one, device)
    clips_folder.mkdir(parents=True, exist_ok=True)

    reference = judge(decoded_batches(pipeline, data, settings.clips, settings), evaluator)
    other = judge(decoded_batches(pipeline, data, settings.clips, settings, first=settings.clips), evaluator)
    qualities: dict[str, Quality] = {}
    for name in ROWS:
        keep = _first_clips(settings.gallery, partial(write_clip, clips_folder, name))
        batches = generated_batches(pipeline, denoisers[name], data, settings, track, f"generate {name}", keep)
        qualities[name] = compare(judge(batches, evaluator), reference)
    gallery = _gallery(pipeline, data, settings, clips_folder)

    level = torch.zeros(1, device=device)
    calls: dict[str, Callable[[], object]] = {
        name: partial(denoiser, latents, level, condition) for name, denoiser in denoisers.items()
    }
    with torch.no_grad():
        latencies = measure_latencies(calls, device, runs=settings.latency_runs, warmup=settings.latency_warmup)
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
        provenance=provenance,
    )


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
    closed = ", ".join(f"{k.replace('_', ' ')} {share(v)}" for k, v in report.recovery.items())
    lines += [
        "",
        f"{report.parameter_reduction:.1%} fewer U-Net parameters, {report.flop_ratio:.3f} of the FLOPs, "
        f"{report.latency_ratio:.3f} of the latency (median of {report.rows[0].latency.runs}). "
        f"Share of the gap closed: {closed}. Distances are toy Frechet distances of the offline evaluator, "
        "comparable with nothing published.",
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
        metrics |= {
            f"speed/latency_ms/{row.name}": row.latency.median_ms,
            f"speed/flops/{row.name}": float(row.flops),
            f"size/unet_parameters/{row.name}": float(row.parameters),
        }
    return metrics
