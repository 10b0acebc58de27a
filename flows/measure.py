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
