"""Chooses which units to remove: for now the paper's layout, or what the user lists."""

from collections.abc import Callable

from torch import Tensor

from vdmini_core.artifacts import Plan, Provenance
from vdmini_core.evaluation.costs import count_costs
from vdmini_core.models import Condition, IllegalPlan, SpatioTemporalUNet
from vdmini_core.models.graph import expand
from vdmini_core.settings import PlanSettings


def paper_layout(denoiser: SpatioTemporalUNet, settings: PlanSettings) -> tuple[str, ...]:
    """VDMini's layout (paper, Fig. 2 and Table A4).

    The second R-A pair of every DownBlock and UpBlock goes, except in the stage next to the innermost
    (D.2 and U.1), which stays whole; the innermost blocks (D.3, M, U.0) go altogether.
    """
    innermost = denoiser.stages - 1
    removed = [f"D.{innermost}", "M", "U.0"]
    for stage in range(innermost - 1):
        removed += [f"D.{stage}.1", f"U.{innermost - stage}.1"]
    return expand(removed, denoiser.units)


def manual(denoiser: SpatioTemporalUNet, settings: PlanSettings) -> tuple[str, ...]:
    """Exactly the units and blocks of `plan.remove`."""
    if not settings.remove:
        raise IllegalPlan("plan.method is manual but plan.remove is empty; list units such as [D.0.1, U.3.1]")
    return expand(settings.remove, denoiser.units)


METHODS: dict[str, Callable[[SpatioTemporalUNet, PlanSettings], tuple[str, ...]]] = {
    "paper": paper_layout,
    "manual": manual,
}


def make_plan(
    denoiser: SpatioTemporalUNet,
    settings: PlanSettings,
    latents: Tensor,
    condition: Condition,
    *,
    report_digest: str,
    teacher_digest: str,
    provenance: Provenance,
) -> Plan:
    """Choose the removal, build the student once to know that it is legal, and count what it saves.

    Raises IllegalPlan naming the units and what to remove instead.
    """
    removed = METHODS[settings.method](denoiser, settings)
    before = count_costs(denoiser, latents, condition)
    after = count_costs(denoiser.without(removed), latents, condition)
    return Plan(
        method=settings.method,
        removed=removed,
        kept=tuple(unit.name for unit in denoiser.units if unit.name not in removed),
        teacher_parameters=before.parameters,
        student_parameters=after.parameters,
        teacher_flops=before.flops,
        student_flops=after.flops,
        report_digest=report_digest,
        teacher_digest=teacher_digest,
        provenance=provenance,
    )


def describe_plan(plan: Plan) -> str:
    """The plan as a few lines of markdown."""
    fewer = 1 - plan.student_parameters / plan.teacher_parameters
    return (
        f"Plan `{plan.method}`: {plan.teacher_parameters:,} -> {plan.student_parameters:,} parameters "
        f"({fewer:.1%} fewer), {plan.student_flops / plan.teacher_flops:.3f} of the FLOPs\n\n"
        f"- removed: {', '.join(plan.removed)}\n- kept: {', '.join(plan.kept)}\n"
    )
