"""The commands of studies: `vdmini ablation`, `baselines` and `probe`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import RUN, explained, flow_explained, prepare_flow

studies = typer.Typer()

Seeds = Annotated[int, typer.Option(min=1, help="Trainings of every arm.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Of every training; distill.loop.max_steps.")]
Clips = Annotated[int | None, typer.Option(min=2, help="To judge every student by; evaluate.clips.")]


def run_study(kind: str, flow: Callable[[], dict[str, str]]) -> None:
    """Run a study's flow and print its table."""
    root = Path.cwd()
    with explained():
        from flows.study import check_inputs, folder_of

        check_inputs(root, kind)  # before Prefect starts
    with flow_explained(), explained():
        rows = flow()
    typer.echo("\n".join(f"{name:24}{result}" for name, result in rows.items()))
    typer.echo("\n" + (root / folder_of(kind) / "table.md").read_text().rstrip())
    typer.echo(f"\nplot: {root / folder_of(kind) / 'plot.png'}")


@studies.command(rich_help_panel=RUN)
def ablation(seeds: Seeds = 3, steps: Steps = None, clips: Clips = None) -> None:
    """Compare the losses: train the pruned student with the task loss alone, +ICD, +MCA and both.

    Needs the student of `vdmini run --target prune`. Table, plot and rows are in artifacts/ablation. Finished
    rows are kept and an interrupted training goes on, so the same command may be given again. Exit codes:
    0 done, 1 a training failed, 2 wrong settings, or inputs that are missing or out of date.
    """
    with explained():
        prepare_flow(Path.cwd())
        from flows.study import ablation as flow
    run_study("ablation", lambda: flow(seeds, steps, clips))


@studies.command(rich_help_panel=RUN)
def baselines(
    seeds: Seeds = 3,
    steps: Steps = None,
    clips: Clips = None,
    plans: Annotated[Path | None, typer.Option(help="JSON as `vdmini probe` takes it: further plans to train.")] = None,
) -> None:
    """Compare ways to prune: students of the paper's size, each recovered with the same steps.

    The paper's layout, the current plan where its method is another, uniform depth, random units, and channel pruning
    by magnitude and by DepGraph (L2, Taylor). Needs `vdmini run --target plan`. Table, plot, rows and
    students are in artifacts/comparison; otherwise as `vdmini ablation`.
    """
    with explained():
        prepare_flow(Path.cwd())
        from flows.study import baselines as flow
        from vdmini_core.artifacts import read_json
        from vdmini_core.evaluation.study import Candidates

        if plans is not None:
            read_json(plans, Candidates)  # before Prefect starts
    run_study("comparison", lambda: flow(seeds, steps, clips, None if plans is None else str(plans)))


@studies.command(rich_help_panel=RUN)
def probe(
    candidates: Annotated[
        Path,
        typer.Argument(help='JSON: {"plans": [{"name": ..., "removed": [...], "predicted": ...}]}, the best first.'),
    ] = Path("artifacts/plan/candidates.json"),
    top: Annotated[int, typer.Option(min=1, help="How many of the plans.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Of every training.")] = 60,
    clips: Clips = None,
) -> None:
    """Try plans before a long training: recover each, and the paper's layout, for a few equal steps, and rank them.

    The table has their order before and after, and how well the two agree; artifacts/probe/ranking.json names the
    winner. Needs `vdmini run --target plan`; otherwise as `vdmini ablation`.
    """
    with explained():
        prepare_flow(Path.cwd())
        from flows.study import probe as flow
        from vdmini_core.artifacts import read_json
        from vdmini_core.evaluation.study import Candidates

        read_json(candidates, Candidates)  # before Prefect starts
    run_study("probe", lambda: flow(str(candidates), top, steps, clips))
