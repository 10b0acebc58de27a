"""Stage evaluate: teacher, prune-only and recovered on the same seeds; numbers, clips and the report."""

import json

from tasks._inputs import evaluator, protocol, teacher_manifest, teacher_pipeline, test_clips
from tasks._stage import Context
from vdmini_core.artifacts import Plan, SensitivityReport, folder_digest, read_json, write_json
from vdmini_core.evaluation.compare import evaluate_rows, flat_metrics, summary
from vdmini_core.evaluation.report import write_report


def run(context: Context) -> None:
    settings, folder = context.params.evaluate, context.folder
    pipeline = teacher_pipeline(context, "denoiser", "vae")
    students = {"pruned": context.input("prune") / "denoiser", "recovered": context.input("distill") / "denoiser"}
    vae = context.input("decoder") / "vae"
    digests = students | ({"decoder": vae} if vae.is_dir() else {})
    report = evaluate_rows(
        pipeline,
        students,
        test_clips(context),
        evaluator(context),
        settings,
        folder / "clips",
        protocol(context, settings),
        context.provenance(
            teacher=teacher_manifest(context).digest, **{name: folder_digest(path) for name, path in digests.items()}
        ),
        context.track,
        vae if vae.is_dir() else None,
    )
    write_json(folder / "report.json", report)
    write_json(folder / "metrics.json", flat_metrics(report))
    (folder / "summary.md").write_text(summary(report))
    sensitivity = read_json(context.input("sensitivity") / "report.json", SensitivityReport)
    plan = read_json(context.input("plan") / "plan.json", Plan)
    training = json.loads((context.input("distill") / "history.json").read_text())["rows"]
    write_report(folder / "report.html", report, sensitivity, plan, folder / "clips", training)
    context.log(flat_metrics(report), 0)
    for name in ("report.html", "summary.md", "report.json"):
        context.tracker.artifact(folder / name)
