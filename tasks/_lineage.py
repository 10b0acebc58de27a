"""Lineage: what a version of the registry was made of and by, in one record that is kept with the version.

The record stands in one tag of the version, so that there is no version without it and a backup of the
registry's database holds it. What nobody recorded is None, and is named as missing.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tasks._registry import DIGEST_TAG, OUTPUTS_TAG, find_version, run_with_outputs
from tasks._tracking import PARENT_VARIABLE, flatten
from vdmini_core.artifacts import Provenance, Record, file_digest, folder_digest

if TYPE_CHECKING:
    from tasks._stage import Context

LINEAGE_TAG = "vdmini.lineage"
RECORDED = ("params.yaml", "dvc.lock")  # may differ from the commit: the record has their text
MISSING = "not recorded"


class Results(Record):
    """What a run's artifacts say of themselves; a digest is a sha256, of the plan that of plan.json."""

    teacher: str | None = None
    teacher_revision: str | None = None
    teacher_digest: str | None = None
    teacher_files: dict[str, str] | None = None
    data_digest: str | None = None
    data_clips: int | None = None
    plan_method: str | None = None
    plan_digest: str | None = None
    removed: tuple[str, ...] | None = None
    protocol_digest: str | None = None
    protocol: dict[str, Any] | None = None
    model_digest: str | None = None
    model_files: dict[str, str] | None = None


class StageRun(Record):
    """The tracking run that made a stage's results, and where it ran; `outputs` is their digest, of register's the
    model's."""

    outputs: str | None = None
    run_id: str | None = None
    commit: str | None = None
    machine: str | None = None
    threads: int | None = None
    processes: int | None = None
    software: dict[str, str] | None = None


class Lineage(Record):
    """Where a version comes from. `changed` are the tracked files that differed from the commit; params and dvc_lock
    are texts, of dvc.lock as it was before stage register ended."""

    commit: str | None = None
    changed: tuple[str, ...] | None = None
    params: str | None = None
    dvc_lock: str | None = None
    results: Results = Results()
    parent_run_id: str | None = None
    stages: dict[str, StageRun] | None = None

    def missing(self) -> list[str]:
        """Names of the facts that nobody recorded, such as `stages.encode.threads`."""
        facts = self.model_dump(mode="json")
        if facts["results"]["protocol"] is not None:
            del facts["results"]["protocol"]  # a setting may be None
        allowed = {"parent_run_id", "results.teacher_revision"}  # a run may have no parent, a folder no revision
        return sorted(name for name, value in flatten(facts).items() if value == "None" and name not in allowed)


def results_in(artifacts: Path) -> Results:
    """Read what there is in a run's artifacts, of this or another commit."""
    teacher, plan = _json(artifacts / "teacher/teacher.json"), artifacts / "plan/plan.json"
    data, report = _json(artifacts / "data/manifest.json"), _json(artifacts / "evaluate/report.json")
    removed, model = _json(plan).get("removed"), artifacts / "register/model"
    files = sorted(path for path in model.rglob("*") if path.is_file())
    return Results(
        teacher=teacher.get("source"),
        teacher_revision=teacher.get("revision"),
        teacher_digest=teacher.get("digest"),
        teacher_files=teacher.get("digests"),
        data_digest=data.get("digest"),
        data_clips=len(data["clips"]) if "clips" in data else None,
        plan_method=_json(plan).get("method"),
        plan_digest=file_digest(plan) if plan.is_file() else None,
        removed=None if removed is None else tuple(removed),
        protocol_digest=report.get("protocol_digest"),
        protocol=report.get("protocol"),
        model_digest=folder_digest(model) if files else None,
        model_files={str(path.relative_to(model)): file_digest(path) for path in files} or None,
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}  # type: ignore[no-any-return]


def lineage_here(context: "Context", provenance: Provenance) -> Lineage:
    """The lineage of what stage register is about to register; the runs of the other stages are looked up."""
    from tasks._stage import ARTIFACTS, STAGES, changed_files, run_tags  # loads torch, which readers do not need

    results, changed = results_in(ARTIFACTS), changed_files()
    runs = {name: stage_run(name, folder_digest(ARTIFACTS / name)) for name in STAGES if name != context.stage}
    own = _stage_run(context.tracker.run_id, run_tags(provenance, str(results.model_digest)))
    return Lineage(
        commit=None if provenance.commit == "unknown" else provenance.commit,
        changed=None if changed is None else tuple(name for name in changed if name not in RECORDED),
        params=_text(Path("params.yaml")),
        dvc_lock=_text(Path("dvc.lock")),
        results=results,
        parent_run_id=os.environ.get(PARENT_VARIABLE) or None,
        stages={**runs, context.stage: own},
    )


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def stage_run(stage: str, outputs: str) -> StageRun:
    """The last finished run of the stage that made exactly these outputs, on whatever machine."""
    run_id, tags = run_with_outputs(stage, outputs)
    return _stage_run(run_id, {**tags, OUTPUTS_TAG: outputs})


def _stage_run(run_id: str | None, tags: dict[str, str]) -> StageRun:
    threads, processes = tags.get("vdmini.threads"), tags.get("vdmini.processes")
    software = tags.get("vdmini.software")
    return StageRun(
        outputs=tags[OUTPUTS_TAG],
        run_id=run_id,
        commit=tags.get("git.commit"),
        machine=tags.get("vdmini.machine"),
        threads=None if threads is None else int(threads),
        processes=None if processes is None else int(processes),
        software=None if software is None else json.loads(software),
    )


def lineage_tags(lineage: Lineage) -> dict[str, str]:
    """The record as a version's tag, and beside it what one searches and sorts versions by."""
    found = lineage.results
    short = {
        DIGEST_TAG: found.model_digest,
        "vdmini.commit": lineage.commit,
        "vdmini.teacher": found.teacher,
        "vdmini.teacher_digest": found.teacher_digest,
        "vdmini.data_digest": found.data_digest,
        "vdmini.plan_digest": found.plan_digest,
        "vdmini.removed": ",".join(found.removed or ()),
        "vdmini.evaluation_protocol": found.protocol_digest,
    }
    known = {name: value for name, value in short.items() if value is not None}
    return known | {LINEAGE_TAG: lineage.model_dump_json()}


def lineage_of(uri: str) -> Lineage:
    """Of `models:/<name>@<alias>` or `models:/<name>/<version>`; of an old version what its tags say.

    Raises what `find_version` raises for a version that is not there.
    """
    tags = dict(find_version(uri).tags)
    if LINEAGE_TAG in tags:
        return Lineage.model_validate_json(tags[LINEAGE_TAG])
    removed, params = tags.get("vdmini.removed"), tags.get("vdmini.params")
    found = Results(
        teacher=tags.get("vdmini.teacher"),
        teacher_digest=tags.get("vdmini.teacher_digest"),
        plan_digest=tags.get("vdmini.plan_digest"),
        removed=None if removed is None else tuple(removed.split(",")),
        protocol_digest=tags.get("vdmini.evaluation_protocol"),
        model_digest=tags.get(DIGEST_TAG),
    )
    return Lineage(
        commit=tags.get("vdmini.commit"), results=found, params=None if params is None else _old_params(params)
    )


def _old_params(text: str) -> str:
    """Before there was a lineage, versions kept their settings under the names of the fields in Python."""
    values = {name.removesuffix("_"): section for name, section in json.loads(text).items()}
    return yaml.safe_dump(values, sort_keys=False)


def registered_metrics(uri: str) -> dict[str, float]:
    """The headline figures of a version."""
    tags = dict(find_version(uri).tags)
    return {name.removeprefix("metric."): float(value) for name, value in tags.items() if name.startswith("metric.")}


def outputs_in_lock(text: str | None) -> dict[str, dict[str, str]]:
    """DVC's digests of what every stage wrote, from the text of dvc.lock: stage -> path -> digest."""
    stages = (yaml.safe_load(text) or {}).get("stages", {}) if text else {}
    return {name: {out["path"]: out["md5"] for out in entry.get("outs", [])} for name, entry in stages.items()}


def lineage_text(uri: str, lineage: Lineage) -> str:
    """For a reader: everything, in the order in which one asks."""
    found = lineage.results

    def row(name: str, *values: object) -> str:
        return f"{name:12}" + "  ".join(MISSING if value is None else str(value) for value in values)

    changed = (
        "" if lineage.changed is None else f"changed: {', '.join(lineage.changed)}" if lineage.changed else "clean"
    )
    lines = [
        uri,
        "",
        row("commit", lineage.commit, *([changed] if changed else [])),
        row("teacher", found.teacher, *([f"revision {found.teacher_revision}"] if found.teacher_revision else [])),
        row("  digest", found.teacher_digest),
        row("data", found.data_digest, *([f"{found.data_clips} clips"] if found.data_clips else [])),
        row("plan", found.plan_method, f"removes {', '.join(found.removed)}" if found.removed else None),
        row("  digest", found.plan_digest),
        row("evaluation", found.protocol_digest),
        *(f"  {name} = {value}" for name, value in flatten(found.protocol or {}).items()),
        row("model", found.model_digest),
        *(f"  {digest}  {name}" for name, digest in (found.model_files or {}).items()),
        row("recipe run", lineage.parent_run_id or (lineage.stages and "none: by hand or by `dvc repro`")),
        "",
        *_stage_lines(lineage.stages),
        *software_lines(lineage),
        "",
        "dvc.lock" + ("" if lineage.dvc_lock else f"    {MISSING}"),
        *(
            f"  {stage:14}{digest}  {path}"
            for stage, outs in outputs_in_lock(lineage.dvc_lock).items()
            for path, digest in outs.items()
        ),
        "",
        "params.yaml" + ("" if lineage.params else f" {MISSING}"),
        *(f"  {line}" for line in (lineage.params or "").rstrip().splitlines()),
    ]
    if unknown := lineage.missing():
        lines += ["", "missing:", *(f"  {name}" for name in unknown)]
    return "\n".join(lines)


def _stage_lines(stages: dict[str, StageRun] | None) -> list[str]:
    if stages is None:
        return [f"stages      {MISSING}"]
    rows = [("stage", "run", "commit", "threads", "results", "machine")]
    rows += [
        (name, run.run_id, run.commit and run.commit[:12], run.threads, run.outputs and run.outputs[:12], _machine(run))
        for name, run in stages.items()
    ]
    texts = [[MISSING if value is None else str(value) for value in values] for values in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip() for cells in texts]


def _machine(run: StageRun) -> str | None:
    several = run.processes is not None and run.processes > 1
    return f"{run.processes} processes on {run.machine}" if several else run.machine


def software_lines(lineage: Lineage) -> list[str]:
    """The versions that the stages ran with; more than one line where they differ."""
    known = [run.software for run in (lineage.stages or {}).values() if run.software]
    texts = dict.fromkeys(", ".join(f"{name} {version}" for name, version in software.items()) for software in known)
    return [f"software      {text}" for text in texts]
