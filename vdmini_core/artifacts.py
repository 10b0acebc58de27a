"""What passes between stages: frozen JSON records, digests, and writes that are whole or absent."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vdmini_core.settings import describe


class Record(BaseModel):
    """Base of every file between stages: frozen, and unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


R = TypeVar("R", bound=Record)


def read_json(path: Path, kind: type[R]) -> R:
    """Read a record, or raise ValueError naming the file and the offending key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the stage that writes it first")
    try:
        return kind.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ValueError(f"{path} is not a valid {kind.__name__}: {describe(error)}") from None


def write_json(path: Path, record: BaseModel | dict[str, Any]) -> None:
    """Write under a temporary name and rename, so that a reader sees all or nothing."""
    value = record.model_dump(mode="json") if isinstance(record, BaseModel) else record
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    except OSError:  # most likely a full disk
        draft.unlink(missing_ok=True)
        raise
    os.replace(draft, path)


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space or quota; safetensors says so in its message alone."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(text in str(error) for text in ("No space left on device", "Disk quota exceeded"))


def file_digest(path: Path) -> str:
    """sha256 of one file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_digest(value: BaseModel | dict[str, Any] | list[Any]) -> str:
    """sha256 of a JSON value in canonical form, hexadecimal."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path, pattern: str = "**/*") -> str:
    """sha256 over the relative names and digests of a folder's files, in name order."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    return json_digest([[str(path.relative_to(folder)), file_digest(path)] for path in files])


class Provenance(Record):
    """What produced a result."""

    commit: str
    dirty: bool
    params: dict[str, Any]
    params_digest: str
    inputs: dict[str, str]
    software: dict[str, str]
    machine: str
    created: str


class Clip(Record):
    """One readable video of the data set; labels are None where the class is not a synthetic one."""

    path: str
    class_name: str
    split: str
    label: tuple[int, int, int] | None


class DataManifest(Record):
    """The data stage's result: what is used, what was skipped and why."""

    root: str
    layout: str
    frames: int
    size: int | tuple[int, int]
    fps: float | None
    clips: tuple[Clip, ...]
    skipped: dict[str, str]
    digest: str


class TeacherManifest(Record):
    """The teacher stage's result: where the weights are, and that they are whole."""

    source: str
    revision: str | None
    pipeline: str
    parameters: dict[str, int]
    digests: dict[str, str]
    digest: str
    blocks: tuple[str, ...]


class LatentManifest(Record):
    """The encode stage's result: shards of latents and conditions per split."""

    shards: dict[str, tuple[str, ...]]
    counts: dict[str, int]
    teacher_digest: str
    data_digest: str
    provenance: Provenance


class Quality(Record):
    """Content and motion of N generated clips; accuracies are None where clips carry no labels."""

    clips: int
    content_accuracy: float | None
    motion_accuracy: float | None
    content_distance: float
    motion_distance: float


class Estimate(Record):
    """A mean over prompts with its bootstrap interval."""

    value: float
    low: float
    high: float


class UnitScore(Record):
    """What bypassing one unit or block does, and what the unit costs.

    `content` and `motion` are damages: how far the clips move from the intact teacher's own, made from the same
    noise and conditions; 0 is none, higher means that the unit matters more. `criteria` are cheaper guesses at that
    by name, also higher for what matters more. `quality` judges the set of clips instead; a unit that was decided
    early has fewer of them. `paired` are further measures of the same pairs of clips. `replaced` are the units that a
    fitted linear map stood in for, because without them the width would not fit.
    """

    name: str
    kind: str
    depth: int
    parameters: int
    flops: int
    latency_ms: float
    quality: Quality
    content: Estimate
    motion: Estimate
    criteria: dict[str, float]
    paired: dict[str, Estimate] = {}
    replaced: tuple[str, ...] = ()


class Cost(Record):
    """Of a network, or of a part of it; a latency that was not measured is None."""

    parameters: int
    flops: int
    latency_ms: float | None


class CostTable(Record):
    """What the whole teacher costs, and each of its parts: units, and pieces that go with the last of some units."""

    whole: Cost
    parts: dict[str, Cost]


class SensitivityReport(Record):
    """Bypass results of every block and pair, beside the intact teacher on the same seeds.

    `teacher` judges the intact teacher on more clips, for the gates; `baselines` on fewer, one for every number of
    clips after which a unit was decided. `controls` are damages of what is no unit, `correlations` Spearman's, of
    the criteria and of depth with the measured damage. FLOPs are the denoiser's in one uninterrupted sweep: spent,
    and as they would be without sharing the first step and with all clips for every unit (`naive`); what the criteria
    and the fits cost is extra. `costs` is what a planner needs to know of the teacher's parts.
    """

    protocol: dict[str, Any]
    protocol_digest: str
    teacher: Quality
    baseline: Quality
    floor: Quality
    scores: tuple[UnitScore, ...]
    teacher_gates: dict[str, bool]
    costs: CostTable
    baselines: tuple[Quality, ...] = ()
    controls: dict[str, dict[str, Estimate]] = {}
    correlations: dict[str, dict[str, float]] = {}
    forward_flops: int = 0
    naive_forward_flops: int = 0
    criteria_flops: int = 0
    provenance: Provenance


class Predicted(Record):
    """What a removal costs, as shares of the teacher's, and damages: costs and damages of the units added up.

    Latency is None where it was not measured, damages where no unit was scored; `damage` is their weighted sum.
    """

    parameters: float
    flops: float
    latency: float | None
    content: float | None = None
    motion: float | None = None
    damage: float | None = None


class Alternative(Record):
    """A removal that was not chosen, and what it would do."""

    removed: tuple[str, ...]
    predicted: Predicted


class Plan(Record):
    """Which units go and which stay, and what that saves.

    Parameters and FLOPs are those of teacher and student, counted; `predicted` and the rest are from the report.
    `budget` and `ratio` are what was asked for; `front` has the least damage at other budgets of the kind, the
    smallest first, and `named` what other methods would remove.
    """

    method: str
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    teacher_parameters: int
    student_parameters: int
    teacher_flops: int
    student_flops: int
    budget: str = "parameters"
    ratio: float | None = None
    predicted: Predicted | None = None
    front: tuple[Alternative, ...] = ()
    named: dict[str, Alternative] = {}
    report_digest: str
    teacher_digest: str
    provenance: Provenance


class Latency(Record):
    """Milliseconds of one network call, over `runs` timed calls."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


class EvaluationRow(Record):
    """One of teacher, pruned, recovered.

    `intervals` holds estimates by the name of the measure: the accuracies of `quality` under its fields' names, what
    the set of clips shows, and for students what pairs of clips show, student's and teacher's. `stages` are the parts
    of making one clip, in order and each as a whole (all calls of the denoiser together): encoder, denoiser,
    vae_decode, and end_to_end around them. `alarms` says in a sentence each what is wrong with the clips.
    """

    name: str
    parameters: int
    flops: int
    latency: Latency
    peak_memory_bytes: int
    quality: Quality
    intervals: dict[str, Estimate] = {}
    stages: dict[str, Latency] = {}
    alarms: dict[str, str] = {}


class Corner(Record):
    """A denoiser (teacher or recovered) with a decoder (original or compressed): clips of the same latents.

    `stages` as in EvaluationRow, of all corners in turn; `flicker_ratio` is to the teacher's with the original decoder.
    `alarms` say what the compressed decoder does to the denoiser's clips.
    """

    denoiser: str
    decoder: str
    parameters: int
    quality: Quality
    flicker_ratio: float
    stages: dict[str, Latency]
    alarms: dict[str, str] = {}


class EvaluationReport(Record):
    """The three rows, their floor, how much of the gap recovery closed, and with two decoders the four corners."""

    protocol: dict[str, Any]
    protocol_digest: str
    rows: tuple[EvaluationRow, ...]
    floor: Quality
    parameter_reduction: float
    flop_ratio: float
    latency_ratio: float
    recovery: dict[str, float | None]
    gallery: tuple[dict[str, str], ...]
    corners: tuple[Corner, ...] = ()
    provenance: Provenance


class WatchedRow(Record):
    """What an alarm is read off after `step` steps: how clips move, flicker and vary, as ratios to the teacher's.

    The hinge loss is the discriminator's, a mean over the training since the row before; None without one.
    """

    step: int
    flow_ratio: float
    flicker_ratio: float
    contrast_ratio: float
    discriminator_hinge: float | None = None


class ValidationRow(WatchedRow):
    """The averaged student on the validation clips after `step` steps of distillation.

    Ratios are to the teacher's clips from the same noise and conditions. A higher score is better.
    """

    content_accuracy: float | None = None
    motion_accuracy: float | None = None
    content_distance: float
    motion_distance: float
    score: float


class Alarm(Record):
    """Something that goes wrong in a training, and what to try."""

    name: str
    step: int
    text: str


class ValidationReport(Record):
    """What was seen of a distillation while it ran; `best` is the step of the best score."""

    teacher: Quality
    rows: tuple[ValidationRow, ...]
    best: int | None
    alarms: tuple[Alarm, ...]


class Reconstruction(Record):
    """Decoded clips beside others: PSNR in dB, SSIM, and flicker, the mean absolute second difference in time."""

    psnr: float
    ssim: float
    flicker: float


class RecoveryRow(WatchedRow):
    """The averaged decoder on held-out latents after `step` steps, beside the original decoder's clips."""

    psnr: float
    ssim: float


class DecoderPart(Record):
    """One part of a decoder: a unit, or what always stays.

    `time_ms` is its time in a call at each share of channels that was timed. The rest is of the original decoder
    without the unit, beside itself: None for a part that cannot go; `damage` is the mean squared difference of pixels.
    """

    name: str
    parameters: int
    flops: int
    time_ms: dict[str, float]
    damage: float | None = None
    alone: Reconstruction | None = None


class ChannelScore(Record):
    """What it does to clips if one resolution keeps a share of its channels, before any training."""

    level: int
    share: float
    damage: float


class DecoderSensitivity(Record):
    """Every part of a decoder, what it costs and what its absence does; times are of `shape` latents on one device."""

    shape: tuple[int, ...]
    whole_ms: dict[str, float]
    parts: tuple[DecoderPart, ...]
    channels: tuple[ChannelScore, ...]
    flicker: float


class DecoderPlan(Record):
    """Which units of a decoder go and what share of channels stays at each resolution, from latents to pixels.

    Parameters are the decoder's, without the encoder; FLOPs and predicted times are of one clip; times are None where
    none was measured.
    """

    method: str
    removed: tuple[str, ...]
    shares: tuple[float, ...]
    layout: tuple[str, str]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    predicted_ms: tuple[float, float] | None = None

    @property
    def predicted_ratio(self) -> float | None:
        """Of the time."""
        return None if self.predicted_ms is None else self.predicted_ms[1] / self.predicted_ms[0]


class DecoderReport(Record):
    """A compressed decoder beside the original one.

    `quality` is of the original's, the pruned and the recovered decoder's clips beside the real held-out ones, `real`
    their flicker; `latencies` are of decoding one clip, original and recovered in turn, `curve` the recovery on
    held-out latents beside the original decoder.
    """

    plan: DecoderPlan
    sensitivity: DecoderSensitivity
    quality: dict[str, Reconstruction]
    real_flicker: float
    clips: int
    latencies: dict[str, Latency]
    curve: tuple[RecoveryRow, ...]
    alarms: tuple[Alarm, ...]
    provenance: Provenance

    @property
    def time_ratio(self) -> float:
        """Measured: what decoding a clip takes after recovery, of the original decoder's time."""
        return self.latencies["recovered"].median_ms / self.latencies["original"].median_ms
