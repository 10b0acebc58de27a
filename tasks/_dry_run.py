"""What `vdmini dry-run` and `vdmini units` print; the figures are the core's."""

from collections.abc import Sequence
from pathlib import Path

from tasks._stage import quieten
from vdmini_core.distillation.memory import distillation_memory
from vdmini_core.pruning.decoder_dry_run import DecoderDryRun
from vdmini_core.pruning.decoder_plan import describe_decoder_plan
from vdmini_core.pruning.dry_run import DryRun, UnitFacts, dry_run, units_of
from vdmini_core.settings import load_params


def dry_run_of(recipe: Path) -> DryRun:
    """The dry run of a params file."""
    quieten()
    return dry_run(load_params(recipe), distillation_memory)


def units_and_note(source: str) -> tuple[tuple[UnitFacts, ...], str]:
    """The units of a model, and what their FLOPs are of."""
    quieten()
    return units_of(source)


def unit_table(units: Sequence[UnitFacts]) -> str:
    """Units as aligned columns."""
    rows = [("unit", "block", "depth", "parameters", "GFLOPs", "removable")]
    for unit in units:
        flops = "unknown" if unit.flops is None else f"{unit.flops / 1e9:,.1f}"
        parts = (unit.name, unit.block, str(unit.depth), f"{unit.parameters:,}", flops, removable_text(unit))
        rows.append(parts)
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    sides = "<<>>>"
    return "\n".join(
        "  ".join([*(f"{cell:{s}{w}}" for cell, s, w in zip(row[:5], sides, widths, strict=True)), row[5]])
        for row in rows
    )


def removable_text(unit: UnitFacts) -> str:
    """What has to go with a unit, in words."""
    if not unit.removable_with:
        return "no"
    ways = [" and ".join(extra) for extra in unit.removable_with]
    return "alone" if ways == [""] else f"with {' or '.join(ways)}"


def dry_run_text(result: DryRun) -> str:
    """The dry run for a person to read."""
    frames, height, width = result.clip_shape
    lines = [
        f"teacher     {result.teacher}",
        f"clips       {frames} frames of {height} x {width}, latents {' x '.join(map(str, result.latent_shape))}",
        "",
        unit_table(result.units),
        "",
        f"plan        {result.plan.method}: removes {', '.join(result.plan.removed)}",
        f"parameters  {result.teacher_parameters:,} -> {result.student_parameters:,}"
        f" ({1 - result.parameter_ratio:.2%} fewer)",
    ]
    if result.reference_parameters is not None:
        lines.append(f"            the original file has {result.reference_parameters:,}, some of which are folded")
    tera = " -> ".join(in_digits(flops / 1e12) for flops in (result.teacher_flops, result.student_flops))
    lines.append(f"TFLOPs      {tera} ({1 - result.flop_ratio:.2%} fewer)")
    for stage, parts in result.memory_parts.items():
        shown = ", ".join(f"{name.replace('_', ' ')} {in_digits(size / 1e9)}" for name, size in parts.items())
        lines.append(f"memory      {stage}: {in_digits(result.memory_bytes[stage] / 1e9)} GB ({shown})")
    if result.pipeline_supported is False:
        lines.append(f"run         `vdmini run` cannot use a {result.pipeline} as a teacher yet")
    return "\n".join([*lines, "", "assumed:", *(f"- {line}" for line in result.assumptions)])


def in_digits(value: float) -> str:
    """A positive number in three digits or more, never with an exponent above 10^-4."""
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def decoder_dry_run_text(result: DecoderDryRun) -> str:
    """A decoder's dry run for a person to read."""
    frames, height, width = result.clip_shape
    rows = [("part", "parameters", "GFLOPs", "can go")]
    for part in result.parts:
        rows.append((part.name, f"{part.parameters:,}", f"{part.flops / 1e9:,.1f}", "no" if part.stays else "yes"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)
    head = (
        f"{result.source}, {result.vae}\n"
        f"{frames} frames of {height} x {width}, latents {' x '.join(map(str, result.latent_shape))}"
    )
    return f"{head}\n\n{table}\n\n{describe_decoder_plan(result.plan).rstrip()}"
