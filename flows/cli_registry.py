"""The commands of the registry: `vdmini lineage` and `vdmini reproduce`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import LOOK, RUN, explained, flow_explained

registry = typer.Typer()

Uri = Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")]
EXIT_CODES = {"same": 0, "metrics agree": 3, "different": 4}


@registry.command(rich_help_panel=LOOK)
def lineage(
    model: Uri,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object on stdout.")] = False,
) -> None:
    """Print what a registered model was made of and by: commit, settings, digests, runs, machines.

    What nobody recorded is listed as missing.
    """
    with explained():
        from tasks._lineage import lineage_of, lineage_text, registered_metrics

        found = lineage_of(model)
        if as_json:
            facts = {**found.model_dump(mode="json"), "metrics": registered_metrics(model), "missing": found.missing()}
            typer.echo(json.dumps({"model": model, **facts}, indent=1))
        else:
            typer.echo(lineage_text(model, found))


@registry.command(rich_help_panel=RUN)
def reproduce(
    model: Uri,
    into: Annotated[Path | None, typer.Option(help="Folder of the clone; .scratch/reproduce/NAME-VERSION.")] = None,
    start: Annotated[str, typer.Option(help="First stage to compute; what is before it is fetched by DVC.")] = "encode",
    tolerance: Annotated[float, typer.Option(min=0, help="For metrics, where digests differ.")] = 0.05,
) -> None:
    """Make a registered model again from its lineage, in a clone at its commit, and compare.

    Nothing else in this folder is touched, and nothing is registered. Interrupted, the same command goes on.
    Digests are equal on the same kind of machine with the same software. Exit codes: 0 the same model, 3 another
    one whose metrics agree within the tolerance (of the registered value, absolute below 1), 4 they do not,
    1 a stage failed, 2 it cannot be made again.
    """
    with explained(), flow_explained():
        from flows.reproduce import reproduce as make

        found = make(model, Path.cwd(), into, start, tolerance, lambda line: typer.echo(line, err=True))
    typer.echo("\n".join(found.lines))
    typer.echo(
        {"same": "the same model", "metrics agree": "another model, metrics agree"}.get(
            found.agreement, "another model"
        )
    )
    raise typer.Exit(EXIT_CODES[found.agreement])
