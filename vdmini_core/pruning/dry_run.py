"""What a recipe would do and need, from configs alone: units, plan, parameters, FLOPs, memory. Loads no weights."""

from collections.abc import Callable

import torch

from vdmini_core.artifacts import Record
from vdmini_core.evaluation.activations import AsOnAccelerator, peak_bytes
from vdmini_core.evaluation.costs import Costs, count_costs, unit_parameters
from vdmini_core.models import PIPELINES, Condition, Denoiser
from vdmini_core.models.published import blueprint, meta_inputs
from vdmini_core.models.vae_facts import LatentShape
from vdmini_core.pruning.planning import METHODS
from vdmini_core.settings import DistillSettings, Params, height_and_width

ASSUMPTIONS = (
    "memory of one device that holds everything: no sharding, no offloading",
    "teacher, student and discriminator heads in float32, as the stages load them; the teacher is frozen",
    "distillation: AdamW with two float32 states, float32 gradients and a float32 average (EMA) of what is trained",
    "distillation: activations are what the student's turn of a step saves for its backward pass, in {precision}, "
    "batch {distill_batch}; gradients are counted in full beside them, so the sum is an upper bound of the two",
    "sensitivity: float32 weights, and the most that one forward pass has alive at once, batch {sensitivity_batch}; "
    "sensitivity.share_start keeps about one activation a unit beside them",
    "attention counts as a fused (flash) kernel, which stores no scores; FLOPs count it in full",
    "not included: the VAE, text and image encoders, the evaluator, the device's own context, fragmentation",
    "activations agree with what small models save on a CPU in float32; no accelerator was measured",
    "FLOPs are of one forward pass of one clip, two per multiply-add, texts padded as the stock pipeline pads them",
)


class UnitFacts(Record):
    """One removable unit; `removable_with` lists the smallest legal removals that take it out, () alone."""

    name: str
    block: str
    depth: int
    parameters: int
    flops: int | None
    removable_with: tuple[tuple[str, ...], ...]


class PlannedUnits(Record):
    """Which units the recipe's plan keeps and removes."""

    method: str
    removed: tuple[str, ...]
    kept: tuple[str, ...]


class DryRun(Record):
    """The result; ratios are student / teacher, FLOPs of one forward pass of one clip, shapes without the batch.

    `pipeline_supported` says whether the stages can run this kind of pipeline yet; None where it is not known.
    """

    teacher: str
    pipeline: str | None
    pipeline_supported: bool | None
    clip_shape: tuple[int, int, int]
    latent_shape: LatentShape
    units: tuple[UnitFacts, ...]
    plan: PlannedUnits
    teacher_parameters: int
    reference_parameters: int | None
    student_parameters: int
    parameter_ratio: float
    teacher_flops: int
    student_flops: int
    flop_ratio: float
    memory_bytes: dict[str, int]
    memory_parts: dict[str, dict[str, int]]
    assumptions: tuple[str, ...]


DistillationMemory = Callable[
    [Denoiser, Denoiser, dict[str, str], DistillSettings, torch.Tensor, Condition], dict[str, int]
]


def dry_run(params: Params, distillation_memory: DistillationMemory) -> DryRun:
    """Everything about a recipe that needs no weights and no data.

    `distillation_memory` estimates what lies above this layer. Raises ValueError where model, clip shape and plan
    do not go together; the message says what to change.
    """
    source = params.teacher.source
    found = blueprint(source)
    if found.vae is None:
        raise ValueError(
            f"what latents {source} makes of a clip is not known: it has no vae/config.json of a known VAE"
        )
    clip = (params.data.frames, *height_and_width(params.data.size))
    latents = found.vae.latent_shape(*clip)
    teacher = found.build()
    removed = METHODS[params.plan.method](teacher, params.plan)
    student = teacher.without(removed)
    before, after = (count_on_meta(denoiser, latents, source) for denoiser in (teacher, student))
    batch = max(params.distill.loop.batch_size // params.distill.loop.accumulate, 1)
    parts = {
        "sensitivity": sensitivity_memory(teacher, latents, params.sensitivity.batch_size),
        "distillation": distillation_memory(
            teacher, student, teacher.surviving(removed), params.distill, *meta_inputs(teacher, latents, batch)
        ),
    }
    types = {"fp32": "float32", "bf16": "bfloat16 as autocast has it on CUDA", "fp16": "float16 as autocast has it"}
    told = types[params.distill.loop.precision]
    figures = {"precision": told, "distill_batch": batch, "sensitivity_batch": params.sensitivity.batch_size}
    return DryRun(
        teacher=source,
        pipeline=found.pipeline,
        pipeline_supported=None if found.pipeline is None else found.pipeline in PIPELINES,
        clip_shape=clip,
        latent_shape=latents,
        units=unit_facts(teacher, before),
        plan=PlannedUnits(
            method=params.plan.method,
            removed=removed,
            kept=tuple(unit.name for unit in teacher.units if unit.name not in removed),
        ),
        teacher_parameters=before.parameters,
        reference_parameters=found.reference_parameters,
        student_parameters=after.parameters,
        parameter_ratio=after.parameters / before.parameters,
        teacher_flops=before.flops,
        student_flops=after.flops,
        flop_ratio=after.flops / before.flops,
        memory_bytes={stage: sum(sizes.values()) for stage, sizes in parts.items()},
        memory_parts=parts,
        assumptions=tuple(line.format_map(figures) for line in ASSUMPTIONS),
    )


def count_on_meta(denoiser: Denoiser, latents: LatentShape, source: str) -> Costs:
    """Parameters and FLOPs; ValueError where the network cannot be called at these latents on the meta device."""
    try:
        return count_costs(denoiser, *meta_inputs(denoiser, latents))
    except (RuntimeError, NotImplementedError) as error:
        shape, reason = " x ".join(map(str, latents)), str(error).strip().splitlines()[0]
        raise ValueError(
            f"the FLOPs of {source}, latents {shape} (C x T x h x w), cannot be counted: {reason}"
        ) from None


def unit_facts(denoiser: Denoiser, costs: Costs | None) -> tuple[UnitFacts, ...]:
    """Every unit of a denoiser; without costs its FLOPs are not known."""
    parameters = unit_parameters(denoiser)
    return tuple(
        UnitFacts(
            name=unit.name,
            block=unit.block,
            depth=unit.depth,
            parameters=parameters[unit.name],
            flops=None if costs is None else costs.unit_flops[unit.name],
            removable_with=denoiser.removable_with(unit.name),
        )
        for unit in denoiser.units
    )


def units_of(source: str) -> tuple[tuple[UnitFacts, ...], str]:
    """The units of whatever `blueprint` understands, and a sentence on what their FLOPs are of, or why unknown."""
    found = blueprint(source)
    denoiser = found.build()
    if found.latents is None:
        return unit_facts(denoiser, None), f"the FLOPs are not known: {source} does not say what clips it was made for"
    try:
        costs = count_on_meta(denoiser, found.latents, source)
    except ValueError as error:
        return unit_facts(denoiser, None), str(error)
    shape = " x ".join(map(str, found.latents))
    return unit_facts(denoiser, costs), f"FLOPs of one forward pass of one clip, latents {shape} (C x T x h x w)"


def sensitivity_memory(teacher: Denoiser, latents: LatentShape, batch: int) -> dict[str, int]:
    """Bytes of generating with the teacher in float32: its weights, and one forward pass at its fullest."""
    inputs, condition = meta_inputs(teacher, latents, batch)
    with AsOnAccelerator(autocast=False), torch.no_grad():
        peak = peak_bytes(lambda: teacher(inputs, torch.ones(batch, device="meta"), condition))
    weights = sum(parameter.nbytes for parameter in teacher.model.parameters())
    return {"teacher_weights": weights, "activations": peak}
