"""`vdmini plan`: its options, and what it prints."""

from pathlib import Path
from typing import Annotated, Any

import typer


def plan(
    latency_ratio: Annotated[float | None, typer.Option(help="Keep at most this share of the latency.")] = None,
    parameter_ratio: Annotated[float | None, typer.Option(help="Or of the parameters.")] = None,
    flop_ratio: Annotated[float | None, typer.Option(help="Or of the FLOPs.")] = None,
    method: Annotated[str, typer.Option(help="optimal, uniform, random, paper, manual.")] = "optimal",
    content_weight: Annotated[float | None, typer.Option(help="Of damage to content; params.yaml's.")] = None,
    motion_weight: Annotated[float | None, typer.Option(help="Of damage to motion; params.yaml's.")] = None,
    protect: Annotated[list[str] | None, typer.Option(help="A unit or block that stays; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of method random.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object on stdout.")] = False,
) -> None:
    """Plan again under another budget, from the finished sensitivity report.

    Nothing is scored, measured or written: to follow a plan, set `plan` in params.yaml. What is not said here is
    as params.yaml has it. Exit codes: 0 done, 2 wrong settings, or a budget that no legal removal meets; the
    nearest possible one is then named.
    """
    from vdmini_core.settings import load_params

    budgets = {"latency": latency_ratio, "parameters": parameter_ratio, "flops": flop_ratio}
    asked = {budget: ratio for budget, ratio in budgets.items() if ratio is not None}
    if len(asked) > 1:
        raise ValueError("give one of --latency-ratio, --parameter-ratio and --flop-ratio")
    changes: dict[str, Any] = {"method": method}
    for budget, ratio in asked.items():
        changes |= {"budget": budget, "ratio": ratio}
    given = {"content_weight": content_weight, "motion_weight": motion_weight, "seed": seed, "protect": protect or None}
    changes |= {name: value for name, value in given.items() if value is not None}
    settings = load_params(Path("params.yaml")).plan

    from tasks._replan import replan
    from vdmini_core.pruning.planning import describe_plan

    found = replan(settings, changes)
    typer.echo(found.model_dump_json(indent=1) if as_json else describe_plan(found).rstrip())
