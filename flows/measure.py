"""Commands that measure what is there, without a recipe: distances of features, VBench, FVD and IS of videos."""

from pathlib import Path
from typing import Annotated

import typer

from flows.errors import explained

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
) -> None:
    """Make VBench's videos, `{prompt}-{0..4}.mp4` in OUT/videos; the same command goes on where it was.

    OUT/generation.json says how they were made; another model or setting is refused there.
    """
    with explained():
        from tasks._vbench import Making, Request, generate

        request = Request(suite, checkout, out, tuple(dimension or ()), per_dimension, ratio, seed)
        made, asked = generate(request, Making(model, steps, frames, fps, crf), shard)
    typer.echo(f"{out / 'videos'}: {made} of the {asked} videos of this shard made now")


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
