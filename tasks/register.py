"""Stage register: assemble the compressed pipeline; if it passes the gate, give it a registry version."""

from tasks._inputs import teacher_manifest
from tasks._lineage import lineage_here, lineage_tags
from tasks._registry import register_model
from tasks._stage import Context
from vdmini_core.artifacts import EvaluationReport, folder_digest, read_json, write_json
from vdmini_core.evaluation.compare import flat_metrics
from vdmini_core.evaluation.gate import failed_gates
from vdmini_core.models.export import export_pipeline
from vdmini_core.models.verify import teacher_folder


def run(context: Context) -> None:
    settings, teacher = context.params.register_, teacher_manifest(context)
    report = read_json(context.input("evaluate") / "report.json", EvaluationReport)
    source = teacher_folder(context.input("teacher") / "teacher.json")
    stock = context.params.register_.mid == "identity"
    vae = context.input("decoder") / "vae"
    model = export_pipeline(
        source,
        context.input("distill") / "denoiser",
        context.folder / "model",
        vae=vae if vae.is_dir() else None,
        stock=stock,
    )
    digest = folder_digest(model)
    provenance = context.provenance(teacher=teacher.digest, model=digest)
    verdict = {"failed": failed_gates(report, settings), "model_digest": digest, "version": None}
    if not verdict["failed"]:
        lineage = lineage_tags(lineage_here(context, provenance))
        metrics = flat_metrics(report)
        verdict["version"] = register_model(
            settings.name, settings.alias, model, lineage, metrics, context.tracker.run_id
        )
        context.say(f"registered models:/{settings.name}/{verdict['version']} as @{settings.alias}")
    else:
        context.say("NOT registered: " + "; ".join(verdict["failed"]))
    context.tracker.tags({"vdmini.gate": "passed" if not verdict["failed"] else "failed"})
    write_json(context.folder / "verdict.json", {**verdict, "provenance": provenance.model_dump(mode="json")})
