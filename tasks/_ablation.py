"""The ablation of the loss, which is no stage: one row a process, then the table of all rows.

`vdmini ablation` and the Prefect deployment vdmini/ablation start these processes, one after the other.
"""

import logging
import shutil
import sys
from pathlib import Path

import torch

from tasks._inputs import evaluator, protocol, teacher_pipeline, test_clips
from tasks._stage import ARTIFACTS, SCRATCH, Context, end_on_sigterm, provenance, quieten, resources_explained
from tasks._tracking import Tracker, open_tracker
from tasks.distill import fingerprint_of, inputs_of, recover
from vdmini_core.artifacts import Provenance, json_digest, read_json, write_json
from vdmini_core.evaluation.ablation import (
    ARMS,
    AblationRow,
    AblationSettings,
    ablation_metrics,
    ablation_report,
    ablation_table,
    arm_settings,
    check_weights,
    plot_ablation,
)
from vdmini_core.evaluation.quality import quality_of
from vdmini_core.models import Denoiser, load_denoiser
from vdmini_core.settings import Params, load_params

FOLDER = ARTIFACTS / "ablation"
TABLE = "table"


def row_path(part: str) -> Path:
    return FOLDER / "rows" / f"{part}.json"


def run_part(part: str, settings: AblationSettings) -> None:
    """Make one row, or keep it if it is what the current settings and inputs would give; or make the table."""
    params = load_params(Path("params.yaml"))
    check_weights(params.distill)
    quieten()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parts = settings.parts(params.distill.loop.seed)
    if part == TABLE:
        with open_tracker(
            "ablation table", settings.model_dump(), SCRATCH / "tracking" / "ablation" / TABLE
        ) as tracker:
            write_table(list(parts), settings, tracker)
        return
    for arm, of_seed in parts.values():  # refused before the first row, not after hours
        if of_seed is not None:
            arm_settings(params.distill, arm, of_seed, settings.steps)
    name, seed = parts[part]
    context = context_of(params, name, seed, settings)
    inputs = inputs_of(context)
    judging = protocol(context, context.params.evaluate)
    training = fingerprint_of(context.params.distill, inputs)
    chosen = context.params.distill.model_dump(mode="json", include={"keep", "validation"})
    fingerprint = json_digest({"training": training, "protocol": judging, "chosen": chosen})
    if row_path(part).is_file() and read_json(row_path(part), AblationRow).fingerprint == fingerprint:
        context.say(f"{row_path(part)} is up to date")
        return
    told = {"arm": name, "seed": seed, "distill": context.settings.model_dump(mode="json"), "clips": settings.clips}
    with open_tracker(f"ablation {part}", told, SCRATCH / "tracking" / "ablation" / part) as tracker:
        context.tracker = tracker
        tracker.tags({"vdmini.stage": "ablation", "vdmini.arm": name})
        with resources_explained(context):
            student, leftovers = network_of(context, name, inputs)
            pipeline = teacher_pipeline(context, "vae")
            clips, judge = test_clips(context), evaluator(context)
            quality = quality_of(pipeline, student, clips, judge, context.params.evaluate, context.track)
        row = AblationRow(
            arm=name,
            seed=seed,
            steps=settings.steps if name in ARMS else 0,
            quality=quality,
            protocol=judging,
            protocol_digest=json_digest(judging),
            fingerprint=fingerprint,
            provenance=context.provenance(**inputs),
        )
        write_json(row_path(part), row)
        tracker.log({f"quality/{k}": v for k, v in quality if isinstance(v, float)}, row.steps)
        tracker.artifact(row_path(part))
    if leftovers is not None:
        shutil.rmtree(leftovers)


def context_of(params: Params, name: str, seed: int | None, settings: AblationSettings) -> Context:
    """Stage distill's surroundings for one arm; its outputs stay as they are. The tracker is still to come."""
    clips = params.evaluate.model_copy(update={"clips": settings.clips})
    update: dict[str, object] = {"evaluate": clips}
    if seed is not None:
        update["distill"] = arm_settings(params.distill, name, seed, settings.steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Context("distill", params.model_copy(update=update), None, device)


def network_of(context: Context, name: str, inputs: dict[str, str]) -> tuple[Denoiser, Path | None]:
    """What is judged in this row, and its checkpoints, None where nothing is trained."""
    if name == "teacher":
        return teacher_pipeline(context, "denoiser").denoiser, None
    if name == "pruned":
        return load_denoiser(context.input("prune") / "denoiser", context.device), None
    end_on_sigterm(context, after_a_checkpoint=True)
    found = recover(context, inputs, SCRATCH / "ablation")
    end_on_sigterm(context, after_a_checkpoint=False)
    return found.student, found.history.file.parent


def write_table(parts: list[str], settings: AblationSettings, tracker: Tracker) -> None:
    """Report, table and plot of the rows."""
    rows = [read_json(row_path(part), AblationRow) for part in parts]
    report = ablation_report(rows, settings, made_from(rows, settings))
    write_json(FOLDER / "report.json", report)
    (FOLDER / "table.md").write_text(ablation_table(report))
    plot_ablation(report, FOLDER / "ablation.png")
    tracker.log(ablation_metrics(report), 0)
    for file in ("report.json", "table.md", "ablation.png"):
        tracker.artifact(FOLDER / file)


def made_from(rows: list[AblationRow], settings: AblationSettings) -> Provenance:
    """The provenance of the report: its rows by their fingerprints."""
    inputs = {f"{row.arm}, seed {row.seed}": row.fingerprint for row in rows}
    return provenance(settings.model_dump(mode="json"), torch.device("cpu"), inputs)


if __name__ == "__main__":
    run_part(sys.argv[1], AblationSettings.model_validate_json(sys.argv[2]))
