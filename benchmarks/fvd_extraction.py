"""How fast features of video files are extracted, and in how much memory, against the loop that one writes first.

The files are real avi of UCF101's size, the extractor a small TorchScript network. README.md has the results.
"""

import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

from flows.terminal import explained
from tasks._stage import provenance
from vdmini_core.artifacts import Provenance, Record, file_digest, write_json
from vdmini_core.data.video import read_clip, write_video
from vdmini_core.evaluation.extractor import Extractor, load_extractor
from vdmini_core.evaluation.video_features import ClipSpec, extract_features

HEIGHT, WIDTH, FPS = 240, 320, 25
DISTINCT = 40
TARGET = 1.5


class Extraction(Record):
    """The result. Times are medians over rounds; the ratio, plain / streamed, is taken round by round.

    Peaks are the process's resident memory in MB by clip count, the libraries included; None where the system does
    not tell. `features_differ` is the largest relative difference between both ways' features.
    """

    command: str
    clips: int
    frames: int
    size: int
    workers: int
    threads: int
    batch: int
    rounds: int
    plain_ms: float
    streamed_ms: float
    decode_ms: float
    extract_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    target: float
    peak_mb: dict[str, dict[str, float | None]]
    features_differ: float
    load: float
    provenance: Provenance


class Network(nn.Module):
    """Strided convolutions and a mean: 400 features, in a fraction of the time of decoding, as I3D takes on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv3d(3, 8, (3, 7, 7), (2, 8, 8)), nn.ReLU(), nn.Conv3d(8, 16, 3, 2), nn.ReLU(), nn.Conv3d(16, 400, 1)
        )

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        return self.layers(2 * x / 255 - 1).mean([2, 3, 4])  # type: ignore[no-any-return]


def write_videos(folder: Path, count: int, frames: int) -> list[str]:
    """`count` files, copies of a few distinct ones, so that 1,000 take seconds to write."""
    names = [f"{index:05d}.avi" for index in range(count)]
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    for index, name in enumerate(names):
        if index >= DISTINCT:
            os.link(folder / names[index % DISTINCT], folder / name)
            continue
        g = np.random.default_rng(index)
        grain = g.normal(0, 6, (HEIGHT, WIDTH, 3))
        a, b, c = g.uniform(0.02, 0.2, 3)
        waves = [127 + 80 * np.sin(a * x + b * y + c * t)[..., None] + grain for t in range(frames)]
        write_video(folder / name, np.clip(waves, 0, 255).astype(np.uint8), fps=FPS, codec="mpeg4", crf=5)
    return names


def plain(folder: Path, names: list[str], extractor: Extractor, spec: ClipSpec, batch: int) -> tuple[Tensor, float]:
    """Decode everything, stack it, extract batch by batch; the features, and the seconds that decoding took."""
    start = time.perf_counter()
    size = spec.size
    clips = np.stack([read_clip(folder / name, frames=spec.frames, fps=spec.fps, size=size) for name in names])
    decoding = time.perf_counter() - start
    videos = torch.from_numpy(clips).permute(0, 4, 1, 2, 3)
    return torch.cat([extractor(part) for part in videos.split(batch)]), decoding


def streamed(folder: Path, names: list[str], extractor: Extractor, spec: ClipSpec, batch: int, workers: int) -> Tensor:
    """The project's own way, from an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        found = extract_features(folder, names, extractor, spec, Path(cache), workers=workers, batch_size=batch)
    return torch.from_numpy(np.asarray(found.values))


def peak_mb(
    way: str, folder: Path, names: list[str], weights: tuple[str, str], spec: ClipSpec, batch: int, workers: int
) -> float | None:
    """The most resident memory of this process, which has to be a fresh one."""
    torch.set_num_threads(1)
    extractor = load_extractor(*weights, folder)
    if way == "plain":
        plain(folder, names, extractor, spec, batch)
    else:
        streamed(folder, names, extractor, spec, batch, workers)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def benchmark(
    *, clips: int, memory_clips: list[int], spec: ClipSpec, workers: int, threads: int, batch: int, rounds: int,
    command: str,
) -> Extraction:  # fmt: skip
    """Alternate both ways on the same files, then measure each one's memory in processes of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = write_videos(folder, max([clips, *memory_clips]), spec.frames + 8)
        script = folder / "network.pt"
        torch.jit.script(Network().eval()).save(str(script))
        weights = (str(script), file_digest(script))
        extractor = load_extractor(*weights, folder)
        chosen = names[:clips]
        plain(folder, chosen[:batch], extractor, spec, batch)  # warm-up
        times: list[tuple[float, float, float]] = []
        for _ in range(rounds):
            start = time.perf_counter()
            expected, decoding = plain(folder, chosen, extractor, spec, batch)
            middle = time.perf_counter()
            found = streamed(folder, chosen, extractor, spec, batch, workers)
            times.append((middle - start, time.perf_counter() - middle, decoding))
        peaks: dict[str, dict[str, float | None]] = {}
        for way in ("streamed", "plain"):
            for count in memory_clips:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    job = pool.submit(peak_mb, way, folder, names[:count], weights, spec, batch, workers)
                    peaks.setdefault(way, {})[str(count)] = job.result()
    torch.set_num_threads(before)
    ratios = np.array([a / b for a, b, _ in times])
    per_clip = [1000 * statistics.median(column) / clips for column in zip(*times, strict=True)]
    scale = expected.abs().max()
    return Extraction(
        command=command,
        clips=clips,
        frames=spec.frames,
        size=int(np.max(spec.size)),
        workers=workers,
        threads=threads,
        batch=batch,
        rounds=rounds,
        plain_ms=per_clip[0],
        streamed_ms=per_clip[1],
        decode_ms=per_clip[2],
        extract_ms=per_clip[0] - per_clip[2],
        ratio=float(np.median(ratios)),
        ratio_p10=float(np.quantile(ratios, 0.1)),
        ratio_p90=float(np.quantile(ratios, 0.9)),
        target=TARGET,
        peak_mb=peaks,
        features_differ=float((found - expected).abs().max() / scale),
        load=os.getloadavg()[0] / (os.cpu_count() or 1),
        provenance=provenance({"workers": workers, "batch": batch}, torch.device("cpu"), {}),
    )


def table(result: Extraction) -> str:
    """The result as a Markdown table of one row."""

    def peak(way: str) -> str:
        return ", ".join("-" if mb is None else f"{mb:.0f}" for mb in result.peak_mb[way].values())

    counts = ", ".join(result.peak_mb["streamed"])
    row = {
        "date": result.provenance.created[:10],
        "clips": f"{result.clips} of {result.frames} x {result.size} x {result.size}",
        "workers, torch threads": f"{result.workers}, {result.threads}",
        "load a core": f"{result.load:.1f}",
        "decode, extract ms a clip": f"{result.decode_ms:.1f}, {result.extract_ms:.1f}",
        "plain ms a clip": f"{result.plain_ms:.1f}",
        "streamed ms a clip": f"{result.streamed_ms:.1f}",
        f"plain / streamed (target {result.target})": (
            f"{result.ratio:.2f} ({result.ratio_p10:.2f}-{result.ratio_p90:.2f})"
        ),
        "rounds": str(result.rounds),
        f"peak MB at {counts} clips: streamed": peak("streamed"),
        "plain": peak("plain"),
        "commit": result.provenance.commit[:8] + " and changes" * result.provenance.dirty,
    }
    return "\n".join(f"| {' | '.join(line)} |" for line in (list(row), ["---"] * len(row), list(row.values())))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    clips: Annotated[int, typer.Option(min=2, help="Files of each timed round.")] = 100,
    memory_clips: Annotated[str, typer.Option(help="Files of the memory measurements, comma-separated.")] = "100,1000",
    frames: Annotated[int, typer.Option(min=4, help="Of a clip.")] = 16,
    size: Annotated[int, typer.Option(help="Pixels, a multiple of 8.")] = 256,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Of the extractor, both ways.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Clips that the extractor gets at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds, both ways in turn.")] = 7,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
) -> None:
    """Time the extraction of features against decode, stack, extract; print a table row."""
    words = ["--clips", clips, "--memory-clips", memory_clips, "--frames", frames, "--size", size]
    words += ["--workers", workers, "--threads", threads, "--batch", batch, "--rounds", rounds]
    with explained():
        result = benchmark(
            clips=clips,
            memory_clips=[int(count) for count in memory_clips.split(",")],
            spec=ClipSpec(frames=frames, size=size),
            workers=workers,
            threads=threads,
            batch=batch,
            rounds=rounds,
            command=shlex.join(["python", "-m", "benchmarks.fvd_extraction", *map(str, words)]),
        )
        if out:
            write_json(out, result)
    typer.echo(table(result))


if __name__ == "__main__":
    sys.exit(app())
