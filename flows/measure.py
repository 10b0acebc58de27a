"""Commands that measure what is there, without a recipe: distances of features, VBench, FVD and IS of videos."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.terminal import explained, flow_explained, prepare_flow

vbench = typer.Typer(help="VBench: generate its videos, run the official evaluation, and aggregate its scores.")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def frechet(
    first: Annotated[Path, typer.Argument(help="Features [N, D] in a .npy file.")],
    second: Annotated[Path, typer.Argument(help="Features [M, D] of the other set.")],
    ddof: Annotated[int, typer.Option(min=0, max=1, help="Of the covariances: 0 as StyleGAN-V, 1 as others.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Frechet distance between two sets of features, in float64."""
    with explained():
        from vdmini_core.evaluation.metrics.frechet import distance_of_files

        result = distance_of_files(first, second, ddof=ddof)
    text = f"{result.distance:.6g}  ({result.first} against {result.second} features of {result.width}, ddof {ddof})"
    typer.echo(result.model_dump_json(indent=1) if as_json else text)


@vbench.command()
def score(
    file: Annotated[Path, typer.Argument(help="An official *_eval_results.json, or {dimension: score in 0..1}.")],
    suite: Annotated[str | None, typer.Option(help="t2v or i2v; by default what the file's dimensions say.")] = None,
    as_json: AsJson = False,
) -> None:
    """Quality, Semantic (or I2V) and Total in percent, as on the leaderboard, and what is missing.

    A group with a missing dimension has no score, and then there is no total.
    """
    with explained():
        from vdmini_core.evaluation.vbench.scores import read_scores

        result = read_scores(file, suite)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
        return
    groups = {"quality": result.quality, "semantic": result.semantic, "i2v": result.i2v, "total": result.total}
    wanted = ("quality", "semantic" if result.suite == "t2v" else "i2v", "total")
    for name in wanted:
        value = groups[name]
        typer.echo(f"{name:9}{'incomplete' if value is None else f'{value:.2f}'}")
    if result.missing:
        typer.echo(f"missing  {', '.join(result.missing)}")
    if result.short:
        counts = (f"{name} {listed} of {asked}" for name, (listed, asked) in result.short.items())
        typer.echo(f"videos   fewer than the suite asks for: {', '.join(counts)}")
    if result.others:
        typer.echo(f"not used {', '.join(result.others)}")


@vbench.command()
def flicker(
    videos: Annotated[list[Path], typer.Argument(help="Encoded videos.", exists=True, dir_okay=False)],
    as_json: AsJson = False,
) -> None:
    """VBench's temporal_flickering of videos, computed here; it needs no weights."""
    with explained():
        from vdmini_core.evaluation.vbench.flicker import temporal_flickering

        result = temporal_flickering(videos)
        if result.score is None:
            raise ValueError("no video could be judged: " + "; ".join(result.skipped.values()))
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
        return
    for name, value in result.videos.items():
        typer.echo(f"{value:.6f}  {name}")
    for reason in result.skipped.values():
        typer.echo(f"skipped   {reason}", err=True)
    typer.echo(f"{result.score:.6f}  mean of {len(result.videos)}")


Checkout = Annotated[Path, typer.Option(help="A checkout of github.com/Vchitect/VBench (see docs/evaluation.md).")]
Out = Annotated[Path, typer.Option(help="Folder of this evaluation; what is there is kept.")]
SuiteName = Annotated[str, typer.Option("--suite", help="t2v (944 prompts) or i2v (1,118).")]
Dimensions = Annotated[list[str] | None, typer.Option("--dimension", help="Only this one; may be repeated.")]
PerDimension = Annotated[int | None, typer.Option(min=1, help="So many prompts a dimension: a subset, marked as such.")]
Ratio = Annotated[str, typer.Option(help="i2v: aspect ratio of the images, 1-1, 8-5, 7-4 or 16-9.")]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps.")]
Frames = Annotated[int | None, typer.Option(min=2, help="Length; the model's own by default.")]
Fps = Annotated[int, typer.Option(min=1, help="Frames a second in the files.")]
Crf = Annotated[int, typer.Option(min=0, max=51, help="H.264 rate factor; it moves the scores.")]
Seed = Annotated[int, typer.Option(help="Every video's seed follows from it, its prompt and its number.")]


@vbench.command("generate")
def vbench_generate(
    model: Annotated[str, typer.Option(help="As for `vdmini generate`.")],
    checkout: Checkout,
    out: Out,
    suite: SuiteName = "t2v",
    dimension: Dimensions = None,
    per_dimension: PerDimension = None,
    ratio: Ratio = "16-9",
    steps: Steps = 8,
    frames: Frames = None,
    fps: Fps = 8,
    crf: Crf = 16,
    seed: Seed = 0,
    shard: Annotated[str, typer.Option(help="i/n: this worker's part of the videos; all write to one folder.")] = "0/1",
    pool: Annotated[str | None, typer.Option(help="A work pool whose workers make them; by default made here.")] = None,
    shards: Annotated[int, typer.Option(min=1, help="With --pool: runs that share the videos.")] = 1,
) -> None:
    """Make VBench's videos, `{prompt}-{0..4}.mp4` in OUT/videos; the same command goes on where it was.

    OUT/generation.json says how they were made; another model or setting is refused there. With --pool they are made in
    shards by the pool's workers, which need the same CHECKOUT in their clones, and MODEL, unless DVC has it.
    """
    with explained():
        from tasks._vbench import Making, Request, generate, missing, words_of

        request = Request(suite, checkout, out, tuple(dimension or ()), per_dimension, ratio, seed)
        making = Making(model, steps, frames, fps, crf)
        if pool:
            if shard != "0/1":
                raise ValueError("--shard is one part, made here; with --pool give --shards, how many there are")
            left = partial(missing, request)
            made = on_pool(words_of(request, making), model, out, pool, shards, left) if left() else 0
            typer.echo(f"{out / 'videos'}: {made} videos came from pool {pool}")
            return
        if shards > 1:
            raise ValueError("--shards is how many runs of a --pool share the videos; a part made here is --shard i/n")
        made, asked = generate(request, making, shard)
    typer.echo(f"{out / 'videos'}: {made} of the {asked} videos of this shard made now")


def on_pool(words: list[str], model: str, out: Path, pool: str, shards: int, left: Callable[[], int]) -> int:
    """Have a benchmark's videos made by a work pool; exit code 1 where a shard fails."""
    root = Path.cwd()
    prepare_flow(root)
    with flow_explained():
        from flows.shards import make_on_pool

        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logger = logging.getLogger("vdmini.shards")
        logger.setLevel(logging.INFO)
        return make_on_pool(words, model, out, root, pool=pool, shards=shards, missing=left, logger=logger)


@vbench.command("run")
def vbench_run(
    checkout: Checkout,
    out: Out,
    python: Annotated[str, typer.Option(help="The Python of the environment that VBench is installed in.")],
    model: Annotated[str | None, typer.Option(help="Make missing videos with it first, as `vbench generate`.")] = None,
    suite: SuiteName = "t2v",
    dimension: Dimensions = None,
    per_dimension: PerDimension = None,
    ratio: Ratio = "16-9",
    steps: Steps = 8,
    frames: Frames = None,
    fps: Fps = 8,
    crf: Crf = 16,
    seed: Seed = 0,
    timeout_minutes: Annotated[float, typer.Option(min=0.01, help="Of each dimension.")] = 360,
    as_json: AsJson = False,
) -> None:
    """Have VBench's own code judge the videos in OUT/videos, dimension by dimension, and aggregate its scores.

    A dimension counts only if its result file is whole and of all its videos; what does not count is named with
    the reason, and tried again by the same command. Exit codes: 0 every dimension scored, 1 some are incomplete,
    2 videos are missing or settings wrong.
    """
    with explained():
        from tasks._vbench import Making, Request, run
        from vdmini_core.evaluation.vbench.official import Official
        from vdmini_core.evaluation.vbench.report import report_text

        request = Request(suite, checkout, out, tuple(dimension or ()), per_dimension, ratio, seed)
        making = Making(model, steps, frames, fps, crf) if model else None
        report = run(request, Official(checkout, python, 60 * timeout_minutes, ratio), making)
    typer.echo(report.model_dump_json(indent=1) if as_json else report_text(report))
    if not all(attempt.scored for attempt in report.attempts.values()):
        raise typer.Exit(1)


ExtractorFile = Annotated[str, typer.Option(help="A TorchScript file: path or URL.")]
Sha256 = Annotated[str, typer.Option(help="Of that file; it is not loaded if it has another.")]
Count = Annotated[int, typer.Option("--clips", min=2, help="N, of each side.")]
ClipFrames = Annotated[int, typer.Option("--frames", min=2, help="Consecutive frames of a clip.")]
ClipSize = Annotated[int, typer.Option("--size", help="Pixels; the short side is resized, the centre cropped.")]
ClipFps = Annotated[float | None, typer.Option("--fps", help="Take frames at this rate; each file's own by default.")]
Start = Annotated[Literal["first", "random"], typer.Option(help="Where in a file a clip begins.")]
Split = Annotated[int, typer.Option(min=1, max=3, help="Of UCF101.")]
ListPart = Annotated[Literal["train", "test", "all"], typer.Option(help="Of UCF101's split.")]
Workers = Annotated[int, typer.Option(min=1, help="Threads that decode while the extractor works.")]
Batch = Annotated[int, typer.Option(min=1, help="Clips that the extractor gets at once.")]
Cache = Annotated[Path, typer.Option(help="Where features are kept, so that the same command goes on.")]
ResultFile = Annotated[Path | None, typer.Option("--out", help="Also write the result to this JSON file.")]
FEATURES = Path(".scratch/features")


def fvd(
    real: Annotated[Path, typer.Argument(help="UCF101 (UCF-101/ beside ucfTrainTestlist/), or a folder of videos.")],
    generated: Annotated[Path, typer.Argument(help="A folder of videos, or what `vdmini ucf101` wrote.")],
    extractor: ExtractorFile,
    sha256: Sha256,
    split: Split = 1,
    part: ListPart = "train",
    clips: Count = 2048,
    frames: ClipFrames = 16,
    size: ClipSize = 256,
    fps: ClipFps = None,
    start: Start = "first",
    ddof: Annotated[int, typer.Option(min=0, max=1, help="Of the covariances: 0 as StyleGAN-V, 1 as others.")] = 0,
    workers: Workers = 2,
    batch: Batch = 8,
    cache: Cache = FEATURES,
    out: ResultFile = None,
    as_json: AsJson = False,
) -> None:
    """Frechet video distance by the protocol of StyleGAN-V, with its N, its floor and its protocol.

    The floor is that of real videos to as many other real ones. Unreadable videos are left out, counted and named.
    """
    with explained():
        from tasks._ucf101 import Extraction
        from tasks._ucf101 import fvd as measure
        from vdmini_core.artifacts import write_json
        from vdmini_core.evaluation.ucf101 import fvd_text
        from vdmini_core.evaluation.video_features import ClipSpec

        spec = ClipSpec(frames=frames, size=size, fps=fps, start=start)
        extraction = Extraction(extractor, sha256, spec, workers, batch, cache)
        result = measure(real, generated, extraction, split, part, clips, ddof)
        if out is not None:
            write_json(out, result)
    typer.echo(result.model_dump_json(indent=1) if as_json else fvd_text(result))


def inception(
    generated: Annotated[Path, typer.Argument(help="A folder of videos, or what `vdmini ucf101` wrote.")],
    extractor: ExtractorFile,
    sha256: Sha256,
    clips: Count = 2048,
    splits: Annotated[int, typer.Option(min=1, help="Parts that the score is a mean of.")] = 10,
    frames: ClipFrames = 16,
    size: ClipSize = 256,
    fps: ClipFps = None,
    workers: Workers = 2,
    batch: Batch = 8,
    cache: Cache = FEATURES,
    out: ResultFile = None,
    as_json: AsJson = False,
) -> None:
    """Inception score of videos, by a classifier such as StyleGAN-V's c3d_ucf101.pt."""
    with explained():
        from tasks._ucf101 import Extraction
        from tasks._ucf101 import inception as measure
        from vdmini_core.artifacts import write_json
        from vdmini_core.evaluation.ucf101 import inception_text
        from vdmini_core.evaluation.video_features import ClipSpec

        extraction = Extraction(extractor, sha256, ClipSpec(frames=frames, size=size, fps=fps), workers, batch, cache)
        result = measure(generated, extraction, clips, splits)
        if out is not None:
            write_json(out, result)
    typer.echo(result.model_dump_json(indent=1) if as_json else inception_text(result))


def ucf101(
    data: Annotated[Path, typer.Argument(help="UCF101 (UCF-101/ beside ucfTrainTestlist/), or a folder of videos.")],
    model: Annotated[str, typer.Option(help="As for `vdmini generate`.")],
    out: Out,
    split: Split = 1,
    part: ListPart = "test",
    clips: Annotated[int | None, typer.Option(min=1, help="Of so many videos; all by default.")] = None,
    steps: Steps = 8,
    fps: Fps = 8,
    crf: Crf = 16,
    seed: Seed = 0,
    shard: Annotated[str, typer.Option(help="i/n: this worker's part of the videos; all write to one folder.")] = "0/1",
) -> None:
    """Make a video for each real one, from its first frame (or of its class, by text), for `vdmini fvd`.

    They go to OUT/videos under the real ones' names; the same command goes on where it was.
    """
    with explained():
        from tasks._ucf101 import generate

        made, asked = generate(
            data, model, out, split=split, part=part, count=clips, steps=steps, fps=fps, crf=crf, seed=seed, shard=shard
        )
    typer.echo(f"{out / 'videos'}: {made.count} of the {asked} videos of this shard made now")
    for reason in made.skipped.values():
        typer.echo(f"skipped: {reason}", err=True)


def compare(
    first: Annotated[Path, typer.Argument(help="The JSON file of a result, such as artifacts/evaluate/report.json.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    despite: Annotated[
        list[str] | None, typer.Option(help="A part of the protocol that may differ; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put the numbers of two results side by side, if they were made by one protocol.

    Otherwise it is said what differs (exit code 2), and they are compared only if each of that is named.
    """
    with explained():
        from vdmini_core.evaluation.protocol import compare_results

        result = compare_results(first, second, despite or ())
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
        return
    if result.despite:
        typer.echo(f"DIFFERENT PROTOCOLS: {', '.join(result.despite)}", err=True)
    width = max((len(row.name) for row in result.numbers), default=0)
    for row in result.numbers:
        typer.echo(f"{row.name:{width}}  {row.first:<12.6g} {row.second:<12.6g} {row.change:+.6g}")
