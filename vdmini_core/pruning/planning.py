"""Chooses which units to remove: for now the paper's layout, or what the user lists."""

import itertools
from collections.abc import Callable

from torch import Tensor

from vdmini_core.artifacts import Plan, Provenance
from vdmini_core.evaluation.costs import count_costs
from vdmini_core.models import Condition, Denoiser, IllegalPlan, TransformerDenoiser, UNetDenoiser
from vdmini_core.models.graph import expand
from vdmini_core.settings import PlanSettings


def paper_layout(denoiser: Denoiser, settings: PlanSettings) -> tuple[str, ...]:
    """VDMini's layout (paper, Fig. 2 and Table A4).

    The second R-A pair of every DownBlock and UpBlock goes, except in the stage next to the innermost
    (D.2 and U.1), which stays whole; the innermost blocks (D.3, M, U.0) go altogether.
    """
    if not isinstance(denoiser, UNetDenoiser):
        raise IllegalPlan("plan.method paper is a layout of U-Nets; for a transformer use uniform or manual")
    innermost = denoiser.stages - 1
    removed = [f"D.{innermost}", "M", "U.0"]
    for stage in range(innermost - 1):
        removed += [f"D.{stage}.1", f"U.{innermost - stage}.1"]
    return expand(removed, denoiser.units)


def manual(denoiser: Denoiser, settings: PlanSettings) -> tuple[str, ...]:
    """Exactly the units and blocks of `plan.remove`."""
    if not settings.remove:
        raise IllegalPlan("plan.method is manual but plan.remove is empty; list units such as [D.0.1, U.3.1]")
    return expand(settings.remove, denoiser.units)


def uniform(denoiser: Denoiser, settings: PlanSettings) -> tuple[str, ...]:
    """A transformer's blocks at even distances, `fraction` of each of its lists; the outermost of a list stay."""
    if not isinstance(denoiser, TransformerDenoiser):
        raise IllegalPlan("plan.method uniform is for lists of blocks; for a U-Net use paper or manual")
    removed = []
    for _, group in itertools.groupby(denoiser.units, key=lambda unit: unit.name.split(".")[0]):
        names = [unit.name for unit in group]
        count = min(round(settings.fraction * len(names)), len(names) - 2)
        inner = names[1:-1]
        removed += [inner[int((index + 0.5) * len(inner) / count)] for index in range(count)]
    if not removed:
        raise IllegalPlan(f"plan.fraction {settings.fraction} of {len(denoiser.units)} blocks is none; raise it")
    return expand(removed, denoiser.units)


METHODS: dict[str, Callable[[Denoiser, PlanSettings], tuple[str, ...]]] = {
    "paper": paper_layout,
    "uniform": uniform,
    "manual": manual,
}


def make_plan(
    denoiser: Denoiser,
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
