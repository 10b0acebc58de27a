"""params.yaml, validated: one frozen model per stage, defaults and meaning in one place."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LoopSettings(Settings):
    """How long and how fast to train; shared by every training in the project."""

    seed: int = 0
    max_steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="clips of a step, in all micro-batches of all processes together")
    accumulate: int = Field(1, gt=0, description="micro-batches of a step, one after the other; less memory")
    parallel: Literal["ddp", "fsdp2"] = Field(
        "ddp", description="several processes: a copy of what is trained in each (ddp), or a share (fsdp2)"
    )
    warmup_steps: int = Field(100, ge=0)
    decay_fraction: float = Field(0.4, ge=0, le=1, description="share of the steps, at the end, of the cosine decay")
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="gradients are clipped to this L2 norm")
    ema_decay: float = Field(0.998, ge=0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="of autocast; fp16 on CUDA alone")
    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, gt=0)


def _checked_size(value: Any) -> Any:
    """One message about the whole key, where pydantic would report each member of the union."""
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if not all(isinstance(side, int) for side in sides):
        raise PydanticCustomError("size", "Input should be one side, or [height, width], in whole pixels")
    for problem, right in (("greater than 0", lambda side: side > 0), ("a multiple of 8", lambda side: side % 8 == 0)):
        if not all(map(right, sides)):
            raise PydanticCustomError("size", f"Input should be {problem}")
    return value


Size = Annotated[int | tuple[int, int], BeforeValidator(_checked_size)]
"""Pixels of a frame: the side of a square, or height and width."""


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """A frame's sides in pixels."""
    return (size, size) if isinstance(size, int) else size


class DataSettings(Settings):
    """Which clips; `source` is `synthetic`, a UCF101 folder, or any folder of videos."""

    source: str = "synthetic"
    split: Literal[1, 2, 3] = Field(1, description="train/test split of the UCF101 layout")
    frames: int = Field(8, gt=1)
    size: Size = Field(64, description="pixels: one side, or [height, width]; multiples of 8")
    fps: float | None = Field(None, gt=0, description="None: each file's own frame rate")
    groups_per_class: int = Field(6, ge=3, description="synthetic: files per class; two in six are test clips")
    quantiser: int = Field(3, ge=2, le=31, description="synthetic: MPEG-4 quantiser, lower is better")
    seed: int = 0


class TeacherSettings(Settings):
    """Which model to compress: `zoo:<name>`, a diffusers pipeline folder, or a hub id with a revision."""

    source: str = "zoo:i2v-shapes"
    revision: str | None = Field(None, description="hub only: the commit to pin")


class EncodeSettings(Settings):
    """Latents and conditions, computed once."""

    train_clips: int = Field(864, gt=0)
    test_clips: int = Field(256, gt=1)
    batch_size: int = Field(16, gt=0)
    fps: int = Field(7, gt=0, description="what the model is told; SVD is told fps - 1")
    motion_bucket_id: int = Field(127, ge=0)
    noise_augmentation: float = Field(0.02, ge=0)
    guidance: float = Field(7.5, ge=0, description="embedded guidance scale, for models distilled with one")
    seed: int = 0


class SamplerSettings(Settings):
    """How clips are generated, alike for teacher and student."""

    clips: int = Field(128, gt=1)
    steps: int = Field(8, gt=0, description="Euler steps over the scheduler's own noise levels")
    batch_size: int = Field(8, gt=0)
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: the networks under autocast, about twice as fast"
    )
    seed: int = 0


class SensitivitySettings(SamplerSettings):
    """Bypass every block and every R-A pair, one at a time, on training clips, which nothing is evaluated on."""

    clips: int = Field(24, gt=1, description="for a unit that is not decided earlier")
    batch_size: int = Field(4, gt=0, description="clips at a time; after each it is asked which units are decided")
    stop_early: bool = Field(
        True, description="no further clips for units that are surely harmless, in the lower half, or known in rank"
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the intervals, which end a unit's measurement too")
    share_start: bool = Field(
        True,
        description="take what comes before a unit in the first step from the intact network; keeps an activation a "
        "unit in memory, which many steps are not worth",
    )
    gate_clips: int = Field(64, gt=1, description="clips on which the intact teacher is judged fit, or all there are")
    calibration_clips: int = Field(8, gt=0, description="for the criteria, and for the linear maps that replace units")
    latency_runs: int = Field(7, gt=0)


class PlanSettings(Settings):
    """Which units to remove; `ratio` is the budget of methods optimal, random and uniform."""

    method: Literal["paper", "optimal", "uniform", "random", "manual"] = Field(
        "paper",
        description="paper: its U-Net layout; optimal: the least measured damage within the budget; "
        "uniform: evenly over depth; random: optimal for damages drawn at random; manual: exactly `remove`",
    )
    budget: Literal["parameters", "flops", "latency"] = Field("parameters", description="what `ratio` is of")
    ratio: float | None = Field(None, gt=0, le=1, description="of the teacher's, at most; None: no budget")
    content_weight: float = Field(1.0, ge=0, description="of damage to content in what optimal makes least")
    motion_weight: float = Field(1.0, ge=0, description="of damage to motion")
    protect: tuple[str, ...] = Field((), description="units or blocks that stay, whatever the method")
    seed: int = Field(0, description="random")
    candidates: int = Field(4, gt=0, description="with ratio: the best plans that are listed for `vdmini probe`")
    random_candidates: int = Field(
        0, ge=0, description="with ratio: plans of random damage listed after them; damage does not foresee recovery"
    )
    fraction: float = Field(0.2, gt=0, lt=1, description="uniform without ratio: share of a transformer's blocks to go")
    remove: tuple[str, ...] = Field((), description="manual: unit or block names, such as D.0.1")

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if self.method in ("optimal", "random") and self.ratio is None:
            raise _contradiction(f"method {self.method} needs a budget; set ratio, such as 0.6")
        if self.content_weight == self.motion_weight == 0:
            raise _contradiction("content_weight and motion_weight are both 0; then no plan is better than another")
        return self


class PruneSettings(Settings):
    """Physical removal; weights are inherited."""

    dtype: Literal["float32", "float16"] = "float32"


class DiscriminatorSettings(Settings):
    """The heads of the multi-frame content adversarial (MCA) loss."""

    learning_rate: float = Field(1.0e-3, gt=0)
    warmup_steps: int = Field(30, ge=0, description="steps that train the heads alone against a fixed student loss")
    ramp_steps: int = Field(60, ge=0, description="steps over which the MCA weight rises from zero after the warm-up")
    sigma_mean: float = 0.0
    sigma_std: float = Field(1.0, gt=0)


class ConsistencySettings(Settings):
    """Task consistency."""

    steps: int = Field(50, gt=1, description="of the ODE solver whose levels the student is trained at, as LCM's 50")


class OneStepSettings(Settings):
    """Task one_step; its heads have the learning rate, warm-up, ramp and noise levels of `discriminator`."""

    sigma_mean: float = Field(
        4.0, description="training noise levels are log-normal; the start of sampling belongs into them, ln 700 for SVD"
    )
    sigma_std: float = Field(1.5, gt=0)
    adversarial_weight: float = Field(0.1, ge=0, description="of the heads' verdict, beside a reconstruction of 1")


class ClipAlarmSettings(Settings):
    """When clips raise an alarm; the teacher's clips are those from the same noise and conditions."""

    motion_collapse: float = Field(0.5, ge=0, description="optical flow below this share of the teacher's")
    slow_motion: float = Field(0.75, ge=0, description="optical flow below this share, but no collapse")
    flicker: float = Field(2.0, ge=0, description="flicker above so many times the teacher's")
    solid_colour: float = Field(0.5, ge=0, description="deviation within a frame below this share of the teacher's")


class AlarmSettings(ClipAlarmSettings):
    """When a validation raises an alarm: for its clips, or for what the training says of itself."""

    discriminator_won: float = Field(0.1, ge=0, description="its hinge loss below this; 2 is chance, 0 has won")
    patience: int = Field(3, gt=0, description="validations in a row for which the discriminator has to have won")


class ValidationSettings(SamplerSettings):
    """Clips of the averaged student as it is trained, from the last test clips; no other stage may use those."""

    every: int = Field(0, ge=0, description="steps from one to the next; 0: none")
    clips: int = Field(16, gt=1)
    alarms: AlarmSettings = AlarmSettings()


def _best_of_validations(keep: str, info: ValidationInfo) -> str:
    """Without a validation there is no best; fields that are wrong themselves are missing from `info`."""
    validation, loop = info.data.get("validation"), info.data.get("loop")
    if keep == "best" and validation and loop and not 0 < validation.every <= loop.max_steps:
        raise PydanticCustomError(
            "keep", "Input should be 'last' unless validation.every is above 0 and at most loop.max_steps"
        )
    return keep


class DistillSettings(Settings):
    """L_task + icd_weight * L_ICD + mca_weight * L_MCA (weights of the paper's Table 5)."""

    loop: LoopSettings
    learning_rate: float = Field(5.0e-4, gt=0)
    task: Literal["denoising", "consistency", "one_step"] = Field(
        "denoising",
        description="L_task: the answer at any level (EDM, DDPM, flow matching); the same clip at neighbouring levels "
        "(few-step models); or the clip from noise in one step, with heads that tell it from real ones (SF-V)",
    )
    target: Literal["data", "teacher"] = Field(
        "data",
        description="task denoising: what L_task compares the student's answer with: the clip's own, or the teacher's "
        "answer, as few-step (LCM) teachers need it, for a clip of their own follows from every noise",
    )
    icd_weight: float = Field(0.1, ge=0)
    icd_distance: Literal["l2", "normalised"] = Field(
        "l2", description="of features: squared difference, as in the paper, or relative to the teacher's variance"
    )
    mca_weight: float = Field(1.0, ge=0)
    teacher_draws: int = Field(
        0,
        ge=0,
        description="noises of a clip, fixed, to which the teacher's answers are computed once and kept on disk (as "
        "many times the latents' size); 0: new noise in every step. With mca_weight 0 training needs no teacher",
    )
    sigma_mean: float = Field(0.0, description="task denoising: training noise levels are log-normal")
    sigma_std: float = Field(1.4, gt=0)
    consistency: ConsistencySettings = ConsistencySettings()
    one_step: OneStepSettings = OneStepSettings()
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    checkpointing: bool = Field(False, description="compute activations twice instead of keeping them; less memory")
    memory_check: bool = Field(True, description="refuse at once what by estimate does not fit into memory")
    compile: bool = Field(False, description="torch.compile for every block of teacher and student")
    validation: ValidationSettings = ValidationSettings()
    keep: Annotated[Literal["last", "best"], AfterValidator(_best_of_validations)] = Field(
        "last", description="which averaged weights become the student: the last, or those with the best validation"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.task != "denoising" and self.target == "teacher":
            raise _contradiction(
                f"task {self.task} does not read target teacher; set target to data, or task to denoising"
            )
        if self.teacher_draws and (self.task, self.target) != ("denoising", "teacher"):
            raise _contradiction(
                f"teacher_draws keeps answers of the teacher, which task {self.task} with target {self.target} does "
                "not read; set teacher_draws to 0, or task to denoising and target to teacher"
            )
        if self.teacher_draws and self.icd_weight > 0:
            raise _contradiction(
                f"teacher_draws saves nothing with icd_weight {self.icd_weight}, for which the teacher runs in every "
                "step; set one of the two to 0"
            )
        return self


def _contradiction(message: str) -> PydanticCustomError:
    """Keys of a section that are right one by one, but not together."""
    return PydanticCustomError("contradiction", "{message}", {"message": message})


class DecoderDiscriminatorSettings(Settings):
    """The patch discriminator of the decoder's adversarial loss."""

    learning_rate: float = Field(5.0e-4, gt=0)
    warmup_steps: int = Field(30, ge=0, description="steps that train it alone against a fixed decoder loss")
    ramp_steps: int = Field(60, ge=0, description="steps over which its weight rises from zero after the warm-up")
    channels: int = Field(24, gt=0, description="of its first layer; the next have twice as many")


class DecoderValidationSettings(Settings):
    """The recovery curve: the averaged decoder on latents of test clips, beside the original decoder's clips."""

    every: int = Field(50, ge=0, description="steps from one to the next; 0: none")
    clips: int = Field(16, gt=1, description="the first test clips, which nothing is chosen by here")
    alarms: AlarmSettings = AlarmSettings()


class DecoderSettings(Settings):
    """The VAE's decoder: which layers and channels go within a budget of time, and how it recovers.

    The loss is reconstruction_weight (L1 + L2) + perceptual_weight + temporal_weight + adversarial_weight, towards what
    the original decoder makes of the cached latents.
    """

    enabled: bool = Field(True, description="false: the decoder stays as it is, and the stage does nothing")
    method: Literal["optimal", "paper", "manual"] = Field(
        "optimal",
        description="optimal: least measured damage within the budget of time; paper: no mid block, one layer in the "
        "last block, .616 of the parameters; manual: exactly `remove` and `shares`",
    )
    ratio: float = Field(0.45, gt=0, le=1, description="optimal: predicted time, of the original decoder's, at most")
    channel_weight: float = Field(
        0.05,
        ge=0,
        description="optimal: of damage by missing channels; training recovers it sooner than missing layers",
    )
    remove: tuple[str, ...] = Field((), description="manual: units or blocks such as M or U.3.1")
    shares: tuple[float, ...] = Field(
        (), description="manual: share of the channels that stays at each resolution, from the latents' to the pixels'"
    )
    clips: int = Field(8, gt=0, description="training clips that the sensitivity is measured on")
    latency_runs: int = Field(7, gt=0, description="timed calls of each decoder for the plan")
    learning_rate: float = Field(1.0e-3, gt=0)
    reconstruction_weight: float = Field(1.0, ge=0)
    perceptual_weight: float = Field(0.1, ge=0)
    perceptual: Literal["evaluator", "lpips"] = Field(
        "evaluator", description="whose features: the project's own evaluator's, or LPIPS (the extra of its name)"
    )
    temporal_weight: float = Field(1.0, ge=0, description="of differences between neighbouring frames, against flicker")
    adversarial_weight: float = Field(0.005, ge=0)
    frames: int | None = Field(None, gt=1, description="latent frames of a training window; None: the whole clip")
    crop: int | None = Field(None, gt=1, description="latents of its side; None: the whole frame")
    discriminator: DecoderDiscriminatorSettings = DecoderDiscriminatorSettings()
    validation: DecoderValidationSettings = DecoderValidationSettings()
    loop: LoopSettings = LoopSettings(max_steps=1000, batch_size=4)

    @model_validator(mode="after")
    def _manual_shares(self) -> Self:
        if self.method == "manual" and not self.remove and not self.shares:
            raise _contradiction("method manual needs remove or shares, such as remove: [M] and shares: [1, 1, .5, .5]")
        if self.method != "manual" and (self.remove or self.shares):
            raise _contradiction(f"remove and shares are of method manual, and method is {self.method}")
        return self


class EvaluateSettings(SamplerSettings):
    """Teacher, prune-only and recovered student side by side on the same seeds."""

    latency_runs: int = Field(30, ge=30)
    latency_warmup: int = Field(5, ge=1)
    end_to_end_runs: int = Field(3, ge=1, description="clips made to time their parts; a ratio of these needs 30")
    gallery: int = Field(6, ge=1, description="clips shown in the report")
    diversity: int = Field(
        6, ge=0, description="conditions of which clips are made from further seeds as well; 0: none"
    )
    diversity_seeds: int = Field(2, ge=2, description="seeds of each of those conditions, all in all")
    perceptual: tuple[Literal["lpips", "dreamsim"], ...] = Field(
        (), description="further distances of student and teacher clips; each needs the extra of its name"
    )
    alarms: ClipAlarmSettings = ClipAlarmSettings()


class RegisterSettings(Settings):
    """The quality gate and the registry entry."""

    name: str = "vdmini"
    alias: str = "champion"
    mid: Literal["none", "identity"] = Field(
        "none",
        description="the exported U-Net where the plan removes M. none: smallest, needs vdmini installed to load; "
        "identity: a stock diffusers checkpoint whose mid block does nothing (a compressed VAE is none)",
    )
    min_parameter_reduction: float = Field(0.2, ge=0, lt=1)
    min_content_accuracy: float = Field(0.0, ge=0, le=1)
    min_motion_accuracy: float = Field(0.0, ge=0, le=1)
    min_content_recovery: float = Field(0.5, le=1, description="share of the gap that pruning opened")
    min_motion_recovery: float = Field(0.5, le=1)


LOCAL = "local"


class Resources(Settings):
    """Where one stage runs; no stage's result depends on it, so that moving a stage makes nothing stale."""

    pool: str = Field(LOCAL, min_length=1, description="local: in place; else a Prefect work pool, by its deployment")
    gpus: int = Field(1, ge=0, description="launcher accelerate: processes on each node, one a GPU; 0: one on the CPU")
    launcher: Literal["none", "accelerate"] = Field("none", description="accelerate: several processes, distill only")
    nodes: int = Field(1, gt=0, description="above 1: of a SLURM allocation, with launcher accelerate")
    parts: int = Field(1, gt=0, description="runs of the pool that share the units, sensitivity only")
    push_checkpoints_s: float = Field(
        60.0, gt=0, description="seconds between looks for checkpoints from which another worker could go on"
    )


def _placeable(resources: dict[str, Resources]) -> dict[str, Resources]:
    """Stages that exist, and only what they can do."""
    stages = [field.alias or name for name, field in Params.model_fields.items() if name != "resources"]
    for name, wanted in resources.items():
        if name not in stages:
            raise _contradiction(f"there is no stage {name}; there are {', '.join(stages)}")
        if name == "register" and wanted.pool != LOCAL:
            raise _contradiction(
                "register records what every stage left in this folder, of which a worker has a part; set "
                f"register.pool to {LOCAL}. Pools are for {', '.join(other for other in stages if other != name)}"
            )
        if wanted.launcher != "none" and name != "distill":
            raise _contradiction(f"only distill runs in several processes; set {name}.launcher to none")
        if wanted.nodes > 1 and wanted.launcher == "none":
            raise _contradiction(f"several nodes need a launcher; set {name}.launcher to accelerate, or nodes to 1")
        if wanted.parts > 1 and (name != "sensitivity" or wanted.pool == LOCAL):
            raise _contradiction(f"only sensitivity, on a pool, has parts; set {name}.parts to 1")
    return resources


class Params(Settings):
    """All of params.yaml."""

    data: DataSettings = DataSettings()
    teacher: TeacherSettings = TeacherSettings()
    encode: EncodeSettings = EncodeSettings()
    sensitivity: SensitivitySettings = SensitivitySettings()
    plan: PlanSettings = PlanSettings()
    prune: PruneSettings = PruneSettings()
    distill: DistillSettings
    decoder: DecoderSettings = DecoderSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    register_: RegisterSettings = Field(RegisterSettings(), alias="register")
    resources: Annotated[dict[str, Resources], AfterValidator(_placeable)] = Field({}, description="by stage")

    def resources_of(self, stage: str) -> Resources:
        """Where a stage runs: here, unless something else is said."""
        return self.resources.get(stage, Resources())


def load_params(path: Path) -> Params:
    """Read and validate params.yaml; ValueError names the file and every offending key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run vdmini from the project's root")
    try:
        values: Any = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        hint = ""
        if any(isinstance(p["input"], str) and "e" in p["input"] for p in error.errors() if "float" in p["type"]):
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)"
        raise ValueError(f"{path}: {describe(error)}{hint}") from None


def describe(error: ValidationError) -> str:
    """Turn pydantic's report into one line: key, what was expected, what was found."""
    parts = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r}")
        elif problem["type"] == "missing":
            parts.append(f"missing key {key!r}")
        elif problem["type"] == "contradiction":
            parts.append(f"{key}: {problem['msg']}")
        else:
            parts.append(f"{key}: {problem['msg']}, got {problem['input']!r}")
    return "; ".join(parts)
