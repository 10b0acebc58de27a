"""Flow "vdmini", deployed as vdmini/ablation, /baselines and /probe: studies of the current run, over seeds.

They train nothing that DVC's graph makes, and stand outside of it: the graph's stages are their inputs.
"""

import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.full import parent_run, publish_plot
from flows.processes import run_logged
from vdmini_core.artifacts import Plan, file_digest, read_json
from vdmini_core.evaluation.study import LOSSES, Arm, Candidates, Study, comparison_arms, probe_arms
from vdmini_core.settings import load_params

NEEDED = {"ablation": "prune", "comparison": "plan", "probe": "plan"}
"""The stage that has to be up to date, with all it depends on."""
PLAN = Path("artifacts/plan/plan.json")
CANDIDATES = Path("artifacts/plan/candidates.json")


def folder_of(kind: str) -> Path:
    """Where a study's results go."""
    return Path("artifacts") / kind


def stale_stages(root: Path, target: str) -> dict[str, str]:
    """The stages that DVC would run for `target`, itself included, each with what changed."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        found: dict[str, list[Any]] = repo.status(targets=[target], with_deps=True)
    return {stage: ", ".join(_changed(changes)) for stage, changes in sorted(found.items())}


def _changed(changes: list[Any]) -> list[str]:
    """DVC's report of a stage in words; it lists dictionaries of what changed, or a plain text."""
    parts = list[str]()
    for change in changes:
        whats = change.values() if isinstance(change, dict) else [{change: ""}]
        parts += [f"{path} {how}".strip() for what in whats for path, how in what.items()]
    return parts


def check_inputs(root: Path, kind: str) -> None:
    """ValueError unless what the study reads is there and up to date: teacher, latents, plan or pruned student."""
    if stale := stale_stages(root, NEEDED[kind]):
        first, changes = next(iter(stale.items()))
        raise ValueError(
            f"the {kind} starts from the current run, but {', '.join(stale)} "
            f"{'is' if len(stale) == 1 else 'are'} missing or out of date ({first}: {changes}); "
            f"bring them up to date first: vdmini run --target {NEEDED[kind]}"
        )


def part_command(part: str, study: Study) -> list[str]:
    """The process that makes a row, or the table."""
    return [sys.executable, "-m", "tasks._study", part, study.model_dump_json()]


@task(task_run_name="{part}", cache_policy=NO_CACHE)
def make_part(part: str, study: Study, parent_run_id: str | None) -> str:
    """One row, `made` or `kept`, or the table."""
    root, row = Path.cwd(), folder_of(study.kind) / "rows" / f"{part}.json"
    before = file_digest(row) if row.is_file() else None
    run_logged(part_command(part, study), f"{study.kind} {part!r}", root, parent_run_id, get_run_logger())
    return "kept" if before is not None and file_digest(row) == before else "made"


def run_study(kind: Any, arms: tuple[Arm, ...], seeds: int, steps: int | None, clips: int | None) -> dict[str, str]:
    """Make every row and the table; what was done with each, in order.

    `steps` and `clips` are params.yaml's (distill.loop.max_steps, evaluate.clips) unless given. Finished rows are kept,
    an interrupted training goes on from its checkpoint. Raises ValueError where settings or inputs do not allow the
    study, StageFailed when a row fails.
    """
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    study = Study(
        kind=kind,
        arms=arms,
        seeds=seeds,
        steps=params.distill.loop.max_steps if steps is None else steps,
        clips=params.evaluate.clips if clips is None else clips,
    )
    study.check(params.distill)
    check_inputs(root, kind)
    results: dict[str, str] = {}
    with parent_run(f"vdmini {kind}", root) as parent:
        for part in (*study.parts(params.distill.loop.seed), "table"):
            # Called, not submitted: Prefect delivers a cancellation to the main thread only.
            results[part] = make_part(part, study, parent.id)
            parent.tags[f"{kind}.{results[part]}"] = ", ".join(p for p in results if results[p] == results[part])
    folder = folder_of(kind)
    try:
        create_markdown_artifact((folder / "table.md").read_text(), key=f"{kind}-table", description=str(folder))
        publish_plot(root / folder / "plot.png", f"{kind}-plot")
    except Exception as error:  # showing a result must not fail the flow that made it
        get_run_logger().warning("the results are not shown in Prefect: %s", error)
    return results


@flow(name="vdmini", log_prints=True)
def ablation(seeds: int = 3, steps: int | None = None, clips: int | None = None) -> dict[str, str]:
    """Train task only, +ICD, +MCA and both on the student of stage prune; see `run_study`."""
    return run_study("ablation", LOSSES, seeds, steps, clips)


@flow(name="vdmini", log_prints=True)
def baselines(
    seeds: int = 3, steps: int | None = None, clips: int | None = None, plans: str | None = None
) -> dict[str, str]:
    """Train students of equal size: the paper's layout, the current plan, those of a file, and the baselines.

    See `run_study`.
    """
    further = () if plans is None else read_json(Path(plans), Candidates).plans
    return run_study("comparison", comparison_arms(read_json(PLAN, Plan), further), seeds, steps, clips)


@flow(name="vdmini", log_prints=True)
def probe(candidates: str = str(CANDIDATES), top: int = 4, steps: int = 60, clips: int | None = None) -> dict[str, str]:
    """Train the `top` first plans of a file and the paper's layout shortly, and rank them; see `run_study`."""
    return run_study("probe", probe_arms(read_json(Path(candidates), Candidates), top), 1, steps, clips)
