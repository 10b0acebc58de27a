"""A study, which is no stage: one row a process, then the table of all rows.

`vdmini ablation`, `baselines` and `probe`, and Prefect deployments of these names, start the processes one after the
other.
"""

import logging
import shutil
import sys
from pathlib import Path

import torch

from tasks._inputs import code_digest, evaluator, protocol, teacher_pipeline, test_clips, train_clips
from tasks._stage import ARTIFACTS, SCRATCH, Context, end_on_sigterm, provenance, quieten, resources_explained
from tasks._tracking import Tracker, open_tracker
from tasks.distill import Pruned, fingerprint_of, inputs_of, pruned_student, recover
from vdmini_core.artifacts import Provenance, SensitivityReport, json_digest, read_json, write_json
from vdmini_core.evaluation.foresight import foresight, foresight_table
from vdmini_core.evaluation.quality import quality_of
from vdmini_core.evaluation.study import STAGE, UNITS, Arm, Part, Study, StudyRow, rank, study_metrics, study_report
from vdmini_core.evaluation.study_pages import plot_study, ranking_table, study_table
from vdmini_core.models import Denoiser, load_denoiser
from vdmini_core.pruning.baselines import SEEDED, Pruning, StudentFacts, parameters_of, student_by, without_units
from vdmini_core.pruning.surgery import save_model
from vdmini_core.settings import Params, load_params

TABLE = "table"
SENSITIVITY = ARTIFACTS / "sensitivity" / "report.json"


def folder_of(study: Study) -> Path:
    return ARTIFACTS / study.kind


def row_path(study: Study, part: str) -> Path:
    return folder_of(study) / "rows" / f"{part}.json"


def run_part(name: str, study: Study) -> None:
    """Make one row, or keep it if it is what the current settings and inputs would give; or make the table."""
    params = load_params(Path("params.yaml"))
    study.check(params.distill)  # refused before the first row, not after hours
    quieten()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    parts = study.parts(params.distill.loop.seed)
    journal = SCRATCH / "tracking" / study.kind / name
    if name == TABLE:
        with open_tracker(f"{study.kind} table", study.model_dump(mode="json"), journal) as tracker:
            write_table(list(parts), study, params, tracker)
        return
    part = parts[name]
    context = context_of(params, part, study)
    pruned = whole(context) if part.arm is None else pruned_of(context, part.arm, part.seed, study)
    inputs = inputs_of(context, pruned)
    judging = protocol(context, context.params.evaluate)
    made_of: dict[str, object] = {"inputs": inputs}
    if part.seed is not None:
        chosen = context.params.distill.model_dump(mode="json", include={"keep", "validation"})
        made_of = {"training": fingerprint_of(context.params.distill, inputs), "chosen": chosen}
    fingerprint = json_digest({**made_of, "protocol": judging})
    path = row_path(study, name)
    if path.is_file() and read_json(path, StudyRow).fingerprint == fingerprint:
        context.say(f"{path} is up to date")
        return
    told = {"arm": part.label, "seed": part.seed, "clips": study.clips}
    told["distill"] = context.settings.model_dump(mode="json")
    with open_tracker(f"{study.kind} {name}", told, journal) as tracker:
        context.tracker = tracker
        tracker.tags({"vdmini.stage": study.kind, "vdmini.arm": part.label})
        with resources_explained(context):
            network, leftovers = network_of(context, part, pruned, inputs)
            pipeline = teacher_pipeline(context, "vae")
            clips, judge = test_clips(context), evaluator(context)
            quality = quality_of(pipeline, network, clips, judge, context.params.evaluate, context.track)
        row = StudyRow(
            arm=part.label,
            seed=part.seed,
            steps=0 if part.seed is None else study.steps,
            parameters=parameters_of(network),
            quality=quality,
            protocol=judging,
            protocol_digest=json_digest(judging),
            fingerprint=fingerprint,
            provenance=context.provenance(**inputs),
        )
        write_json(path, row)
        tracker.log({f"quality/{k}": v for k, v in quality if isinstance(v, float)}, row.steps)
        tracker.artifact(path)
    if leftovers is not None:
        shutil.rmtree(leftovers)


def context_of(params: Params, part: Part, study: Study) -> Context:
    """Stage distill's surroundings for one arm; its outputs stay as they are. The tracker is still to come."""
    clips = params.evaluate.model_copy(update={"clips": study.clips})
    update: dict[str, object] = {"evaluate": clips}
    if part.arm is not None and part.seed is not None:
        update["distill"] = study.arm_settings(params.distill, part.arm, part.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Context("distill", params.model_copy(update=update), None, device)


def whole(context: Context) -> Pruned:
    """The teacher's own network, of which nothing is pruned."""
    pipeline = teacher_pipeline(context)
    return Pruned(pipeline.folder / pipeline.denoiser_folder(), ())


def student_folder(study: Study, arm: Arm, seed: int) -> Path:
    return folder_of(study) / "students" / (f"{arm.name}-seed{seed}" if arm.method in SEEDED else arm.name)


def pruned_of(context: Context, arm: Arm, seed: int | None, study: Study) -> Pruned:
    """The arm's student, made and kept on disk if it is not there as the current inputs would give it."""
    if arm.method == STAGE:
        return pruned_student(context)
    used = context.params.distill.loop.seed if seed is None else seed
    folder = student_folder(study, arm, used)
    drawn = used if arm.method in SEEDED else 0
    how = {"method": arm.method, "removed": list(arm.removed), "seed": drawn}
    code = code_digest(("pruning",))
    made_from = inputs_of(context, whole(context)) | {"pruning": code, "method": json_digest(how)}
    fingerprint = json_digest(made_from)
    facts_path = folder / "student.json"
    if facts_path.is_file() and (facts := read_json(facts_path, StudentFacts)).fingerprint == fingerprint:
        return Pruned(folder / "denoiser", facts.removed, facts.channels)
    pipeline = teacher_pipeline(context, "denoiser")
    pruning = Pruning(pipeline.denoiser, pipeline.process, train_clips(context), drawn)
    student = without_units(pruning, arm.removed) if arm.method == UNITS else student_by(arm.method, pruning)
    folder.mkdir(parents=True, exist_ok=True)
    facts_path.unlink(missing_ok=True)
    save_model(student.denoiser, folder / "denoiser")
    facts = StudentFacts(
        method=arm.method,
        removed=student.removed,
        channels=student.channels,
        parameters=parameters_of(student.denoiser),
        fingerprint=fingerprint,
        provenance=context.provenance(**made_from),
    )
    write_json(facts_path, facts)
    return Pruned(folder / "denoiser", facts.removed, facts.channels)


def network_of(context: Context, part: Part, pruned: Pruned, inputs: dict[str, str]) -> tuple[Denoiser, Path | None]:
    """What is judged in this row, and its checkpoints, None where nothing is trained."""
    if part.seed is None:
        return load_denoiser(pruned.folder, context.device), None
    end_on_sigterm(context, after_a_checkpoint=True)
    found = recover(context, pruned, inputs, SCRATCH / "studies")
    end_on_sigterm(context, after_a_checkpoint=False)
    return found.student, found.history.file.parent


def write_table(parts: list[str], study: Study, params: Params, tracker: Tracker) -> None:
    """Report, table and plot of the rows; of a probe the ranking, and of all but ablations what units foresaw."""
    folder, rows = folder_of(study), [read_json(row_path(study, part), StudyRow) for part in parts]
    report = study_report(rows, study, made_from(rows, study))
    page = study_table(report)
    write_json(folder / "report.json", report)
    if study.kind != "ablation":
        removed = removed_by(study, params.distill.loop.seed)
        if study.kind == "probe":
            ranking = rank(report, {arm.name: removed[arm.name, params.distill.loop.seed] for arm in study.arms})
            write_json(folder / "ranking.json", ranking)
            page = f"{ranking_table(ranking)}\n{page}"
        foreseen = foresight(report, removed, read_json(SENSITIVITY, SensitivityReport))
        write_json(folder / "foresight.json", foreseen)
        page += f"\n{foresight_table(foreseen)}"
    (folder / "table.md").write_text(page)
    plot_study(report, folder / "plot.png")
    tracker.log(study_metrics(report), 0)
    for file in ("report.json", "table.md", "plot.png"):
        tracker.artifact(folder / file)


def removed_by(study: Study, first_seed: int) -> dict[tuple[str, int], tuple[str, ...]]:
    """The units that the student of every trained arm and seed is without."""

    def facts(arm: Arm, seed: int) -> StudentFacts:
        return read_json(student_folder(study, arm, seed) / "student.json", StudentFacts)

    seeds = range(first_seed, first_seed + study.seeds)
    return {(arm.name, seed): facts(arm, seed).removed for arm in study.arms for seed in seeds}


def made_from(rows: list[StudyRow], study: Study) -> Provenance:
    """The provenance of the report: its rows by their fingerprints."""
    inputs = {f"{row.arm}, seed {row.seed}": row.fingerprint for row in rows}
    return provenance(study.model_dump(mode="json"), torch.device("cpu"), inputs)


if __name__ == "__main__":
    run_part(sys.argv[1], Study.model_validate_json(sys.argv[2]))
