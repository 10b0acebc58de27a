"""Flow "vdmini", deployed as vdmini/ablation: the arms of the loss on the current run's student, over seeds.

It trains nothing that DVC's graph makes, and stands outside of it: the graph's stages are its inputs.
"""

import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.full import parent_run, publish_plot, run_logged
from vdmini_core.artifacts import file_digest
from vdmini_core.evaluation.ablation import AblationSettings, check_weights
from vdmini_core.settings import load_params

NEEDED = "prune"  # with all it depends on: teacher, latents, plan
FOLDER = Path("artifacts/ablation")


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


def check_inputs(root: Path) -> None:
    """ValueError unless teacher, latents, plan and pruned student are there and up to date."""
    if stale := stale_stages(root, NEEDED):
        first, changes = next(iter(stale.items()))
        raise ValueError(
            f"the ablation trains the current run's pruned student, but {', '.join(stale)} "
            f"{'is' if len(stale) == 1 else 'are'} missing or out of date ({first}: {changes}); "
            f"bring them up to date first: vdmini run --target {NEEDED}"
        )


def part_command(part: str, settings: AblationSettings) -> list[str]:
    """The process that makes a row, or the table."""
    return [sys.executable, "-m", "tasks._ablation", part, settings.model_dump_json()]


@task(task_run_name="{part}", cache_policy=NO_CACHE)
def make_part(part: str, settings: AblationSettings, parent_run_id: str | None) -> str:
    """One row, `made` or `kept`, or the table."""
    root, row = Path.cwd(), FOLDER / "rows" / f"{part}.json"
    before = file_digest(row) if row.is_file() else None
    run_logged(part_command(part, settings), f"ablation {part!r}", root, parent_run_id, get_run_logger())
    return "kept" if before is not None and file_digest(row) == before else "made"


@flow(name="vdmini", log_prints=True)
def ablation(seeds: int = 3, steps: int | None = None, clips: int | None = None) -> dict[str, str]:
    """Train task only, +ICD, +MCA and both for `seeds` seeds, judge them alike, and write table and plot.

    `steps` of each and `clips` to judge by are params.yaml's (distill.loop.max_steps, evaluate.clips) unless given.
    Finished rows are kept, an interrupted training goes on from its checkpoint. Raises ValueError where
    settings or inputs do not allow it, StageFailed when a row fails.
    """
    root = Path.cwd()
    params = load_params(root / "params.yaml")
    check_weights(params.distill)
    settings = AblationSettings(
        seeds=seeds,
        steps=params.distill.loop.max_steps if steps is None else steps,
        clips=params.evaluate.clips if clips is None else clips,
    )
    check_inputs(root)
    results: dict[str, str] = {}
    with parent_run("vdmini ablation", root) as parent:
        for part in (*settings.parts(params.distill.loop.seed), "table"):
            # Called, not submitted: Prefect delivers a cancellation to the main thread only.
            results[part] = make_part(part, settings, parent.id)
            parent.tags[f"ablation.{results[part]}"] = ", ".join(p for p in results if results[p] == results[part])
    try:
        create_markdown_artifact((FOLDER / "table.md").read_text(), key="ablation-table", description=str(FOLDER))
        publish_plot(root / FOLDER / "ablation.png", "ablation-plot")
    except Exception as error:  # showing a result must not fail the flow that made it
        get_run_logger().warning("the results are not shown in Prefect: %s", error)
    return results
