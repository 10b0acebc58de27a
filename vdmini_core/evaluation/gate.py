"""The quality gate before registration."""

from vdmini_core.artifacts import EvaluationReport
from vdmini_core.evaluation.compare import recovery
from vdmini_core.settings import RegisterSettings


def failed_gates(report: EvaluationReport, settings: RegisterSettings) -> list[str]:
    """One sentence for every threshold that the recovered student misses; empty if it passes.

    The student is what would be registered: with the compressed decoder, where there is one. Accuracy thresholds do
    not apply to clips without labels. Recovery is judged by accuracy where there is one, otherwise by distance; where
    pruning opened no gap there is nothing to close.
    """
    failed = []
    student = report.corners[-1].quality if report.corners else report.rows[-1].quality
    qualities = {row.name: row.quality for row in report.rows} | {report.rows[-1].name: student}
    recovered = recovery(qualities) if report.corners else report.recovery
    if report.parameter_reduction < settings.min_parameter_reduction:
        failed.append(
            f"parameters fell by {report.parameter_reduction:.3f}, "
            f"register.min_parameter_reduction is {settings.min_parameter_reduction}"
        )
    for side in ("content", "motion"):
        accuracy = getattr(student, f"{side}_accuracy")
        wanted = getattr(settings, f"min_{side}_accuracy")
        if accuracy is not None and accuracy < wanted:
            failed.append(f"{side} accuracy is {accuracy:.3f}, register.min_{side}_accuracy is {wanted}")
        measure = f"{side}_distance" if accuracy is None else f"{side}_accuracy"
        closed, wanted = recovered[measure], getattr(settings, f"min_{side}_recovery")
        if closed is not None and closed < wanted:
            failed.append(
                f"{closed:.3f} of the gap in {measure.replace('_', ' ')} was closed, "
                f"register.min_{side}_recovery is {wanted}"
            )
    return failed
