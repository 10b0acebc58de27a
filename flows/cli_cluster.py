"""The commands of several machines: `vdmini deploy` and `vdmini worker`."""

import os
import platform
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import explained, prepare_flow

CLUSTER = "Several machines"

cluster = typer.Typer()


def require_server() -> None:
    """ValueError unless a Prefect server is named, or runs here."""
    prepare_flow(Path.cwd())
    if "PREFECT_API_URL" not in os.environ:
        raise ValueError("no Prefect server is known: export PREFECT_API_URL=http://HOST:4200/api, or run `vdmini up`")


@cluster.command(rich_help_panel=CLUSTER)
def deploy() -> None:
    """Tell the Prefect server of PREFECT_API_URL of this project: pools, deployments, and what a lost worker is.

    `vdmini up` does the same for its own server.
    """
    with explained():
        require_server()
        from flows.deployment import deploy as make

        try:
            make(Path.cwd())
        except RuntimeError as error:
            typer.echo(f"vdmini: {error}", err=True)
            raise typer.Exit(1) from None
    typer.echo(f"deployed to {os.environ['PREFECT_API_URL']}")


@cluster.command(rich_help_panel=CLUSTER)
def worker(
    pool: Annotated[str, typer.Option(help="The work pool to serve, as in params.yaml's resources.")] = "gpu",
    name: Annotated[
        str | None, typer.Option(help="Shown in Prefect; the machine's and the folder's by default.")
    ] = None,
) -> None:
    """Serve a work pool in this clone, one run at a time, until stopped. A GPU that is its own has one worker.

    The clone is the worker's own: it is brought to the commit of each run. Needs PREFECT_API_URL, the DVC remote's
    credentials and MLFLOW_TRACKING_URI in the environment. Several GPUs: a clone each, CUDA_VISIBLE_DEVICES set.
    """
    with explained():
        root = Path.cwd()
        require_server()
        from flows.deployment import worker_command, worker_environment

        os.environ.update(worker_environment(root))
        command = worker_command(pool, name or f"{platform.node()}-{root.name}")
        os.execv(command[0], command)
