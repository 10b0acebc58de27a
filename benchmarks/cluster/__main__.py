"""`python -m benchmarks.cluster`: every scenario, or those that are named; a row of the table as each ends."""

import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cluster.scenarios import SCENARIOS, Result
from benchmarks.cluster.site import Site

HEAD = ("scenario", "what happened", "checks", "states", "recovered after s", "wall s")


def row(result: Result) -> str:
    """A line of a Markdown table."""
    failed = [name for name, held in result.checks.items() if not held]
    checks = (
        f"{len(result.checks)} hold" if result.checks and not failed else f"NOT: {', '.join(failed) or 'none made'}"
    )
    numbers = ["" if value is None else f"{value:.0f}" for value in (result.recovery_s, result.wall_s)]
    return "| " + " | ".join([result.scenario, result.happened, checks, result.states, *numbers]) + " |"


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SCENARIOS)}; may be repeated.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where the site is built; kept, so that a call can go on.")
    ] = None,
    repository: Annotated[Path, typer.Option(help="The clone whose commit is tried.")] = Path("."),
) -> None:
    """Build the site, play the scenarios, print the table. Exit code 1 where a check does not hold."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the servers are to end as well
    names = only or list(SCENARIOS)
    if unknown := set(names) - set(SCENARIOS):
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    site = Site((folder or Path(tempfile.mkdtemp(prefix="vdmini-cluster-"))).resolve(), repository.resolve())
    results = list[Result]()
    started = time.monotonic()
    try:
        site.start()
        typer.echo(f"site {site.folder} is up after {time.monotonic() - started:.0f} s")
        for name in names:
            try:
                results.append(SCENARIOS[name](site))
            except Exception as error:
                traceback.print_exc()
                results.append(
                    Result(name, f"{type(error).__name__}: {str(error)[:200]}", {"it could be played": False})
                )
            typer.echo(row(results[-1]))
    finally:
        site.stop()
    typer.echo("\n| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    typer.echo("\n".join(map(row, results)))
    raise typer.Exit(not all(all(result.checks.values()) for result in results))


if __name__ == "__main__":
    typer.run(main)
