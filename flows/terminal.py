"""What the commands of the command line share: errors as a sentence, exit codes, and a flow's surroundings."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

RUN, LOOK = "Run the recipe", "Look"


@contextmanager
def explained() -> Iterator[None]:
    """What the user can mend, as one paragraph on stderr and exit code 2 instead of a traceback."""
    try:
        yield
    except (ValueError, LookupError, OSError, MemoryError) as error:
        typer.echo(f"vdmini: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def flow_explained() -> Iterator[None]:
    """Exit code 1 where a stage of a flow fails and 130 after Ctrl-C; SIGTERM ends the flow in order."""
    from flows.processes import StageFailed

    # Without a handler SIGTERM would skip the exit hook that ends Prefect's temporary server.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except StageFailed as error:
        typer.echo(f"vdmini: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("vdmini: stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None


def prepare_flow(root: Path) -> None:
    """Check params.yaml, and point Prefect and MLflow at this project's services, before Prefect is imported."""
    from flows.services import environment
    from vdmini_core.settings import load_params

    load_params(root / "params.yaml")
    for name, value in environment(root).items():
        os.environ.setdefault(name, value)
