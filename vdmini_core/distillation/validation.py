"""Watches a distillation: every so many steps the averaged student makes clips, which are judged beside the teacher's.

The conditions are the last `clips` of the test clips, the noise is that of (seed, clip), for teacher and student alike.
Nothing here draws from a generator of the training or changes a network of it.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from vdmini_core.artifacts import Alarm, ValidationReport, ValidationRow
from vdmini_core.data.latents import LatentCache
from vdmini_core.distillation.alarms import all_raised, raised
from vdmini_core.evaluation.compare import to_frames
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.evaluation.metrics.dynamics import DYNAMICS, dynamics
from vdmini_core.evaluation.quality import SMALLEST, Judged, compare, decoded_batches, generated_batches, judge, score
from vdmini_core.models import Denoiser, Pipeline
from vdmini_core.reporting import Log, silent_log
from vdmini_core.settings import ValidationSettings
from vdmini_core.training.checkpoint import load_checkpoint
from vdmini_core.training.history import History

SHOWN, SHOWN_FRAMES, SHOWN_SIDE = 4, 8, 160  # of a picture at most: clips, frames of each, pixels of a frame's side
HINGES = ("train/discriminator/total", "train/task_discriminator/total")

logger = logging.getLogger(__name__)


class Validation:
    """The validations of one training, on disk under `folder`: rows, pictures, and what is known of the teacher.

    `pipeline` has the VAE; `load_teacher` is called where the teacher's part is not on disk yet. `training` is the
    history of the losses. `log` receives every row as `validation/<name>`, `show` the file of every picture, `alert`
    every alarm when it is raised. A resumed training finds the rows and the teacher's part again.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        load_teacher: Callable[[], Denoiser],
        data: LatentCache,
        evaluator: Evaluator,
        settings: ValidationSettings,
        training: History,
        folder: Path,
        *,
        log: Log = silent_log,
        show: Callable[[Path], None] = lambda file: None,
        alert: Callable[[Alarm], None] = lambda alarm: None,
    ) -> None:
        self.pipeline, self.data, self.evaluator, self.settings = pipeline, data, evaluator, settings
        self.training, self.folder, self.log, self.show, self.alert = training, folder, log, show, alert
        self.first = len(data) - settings.clips
        self.history = History(folder / "validation.jsonl")
        self._rows = {int(row["step"]): ValidationRow.model_validate(row) for row in self.history.rows()}
        kept = folder / "teacher.safetensors"
        if not kept.is_file():
            _save_whole(self._of_teacher(load_teacher()), kept)
        found = load_file(kept)
        self.real = Judged(found["real.content"], found["real.motion"], None)
        self.shown, self.dynamics = found["teacher.shown"], found["teacher.dynamics"]
        self.teacher = compare(Judged(found["content"], found["motion"], found.get("right")), self.real)

    def __call__(self, step: int, student: Denoiser) -> None:
        """Validate the averaged student as it is after `step` steps."""
        judged, means, shown = self._generated(student)
        quality = compare(judged, self.real)
        ratios = means / self.dynamics.clamp_min(SMALLEST)
        row = ValidationRow(
            step=step,
            **quality.model_dump(exclude={"clips"}),
            **{f"{name}_ratio": float(ratio) for name, ratio in zip(DYNAMICS, ratios, strict=True)},
            discriminator_hinge=hinge_since(self.training, step, self.settings.every),
            score=score(quality, self.teacher),
        )
        self._rows[step] = row
        values = row.model_dump(exclude={"step"}, exclude_none=True)
        self.history.log(values, step)
        self.log({f"validation/{name}": value for name, value in values.items()}, step)
        picture = self.folder / f"clips-{step:08d}.png"
        write_grid(picture, self.shown, shown)
        self.show(picture)
        for alarm in raised(self.rows(step), self.settings.alarms):
            logger.warning("step %d, alarm %s: %s", alarm.step, alarm.name, alarm.text)
            self.alert(alarm)

    def rows(self, step: int) -> tuple[ValidationRow, ...]:
        """The validations of the first `step` steps, in order; a resumed training repeats those after that."""
        return tuple(self._rows[done] for done in sorted(self._rows) if done <= step)

    def best(self, step: int) -> int | None:
        """The step of the best score among the first `step`, the latest of equals; None before a validation."""
        return best_step(self.rows(step))

    def report(self, step: int) -> ValidationReport:
        """What was seen in the first `step` steps."""
        rows = self.rows(step)
        alarms = all_raised(rows, self.settings.alarms)
        return ValidationReport(teacher=self.teacher, rows=rows, best=best_step(rows), alarms=alarms)

    def _generated(self, denoiser: Denoiser) -> tuple[Judged, Tensor, Tensor]:
        """The validation clips of a network: verdicts, mean dynamics [3], the first as bytes [K, T, H, W, 3]."""
        measured: list[Tensor] = []
        shown: list[Tensor] = []

        def keep(clips: Tensor) -> None:
            measured.append(dynamics(clips))
            room = SHOWN - sum(map(len, shown))
            shown.extend(torch.from_numpy(to_frames(_small(clip)))[None] for clip in clips[:room])

        batches = generated_batches(
            self.pipeline, denoiser, self.data, self.settings, keep=keep, first=self.first, description="validate"
        )
        judged = judge(batches, self.evaluator)
        return judged, torch.cat(measured).mean(0), torch.cat(shown)

    def _of_teacher(self, teacher: Denoiser) -> dict[str, Tensor]:
        """What every validation compares with: real clips as the VAE shows them, and the teacher's own."""
        real = judge(self._real(), self.evaluator)
        judged, means, shown = self._generated(teacher)
        found = {"real.content": real.content, "real.motion": real.motion, "teacher.shown": shown}
        found |= {"teacher.dynamics": means, "content": judged.content, "motion": judged.motion}
        return found if judged.right is None else found | {"right": judged.right}

    def _real(self) -> Iterator[tuple[Tensor, Tensor]]:
        return decoded_batches(self.pipeline, self.data, self.settings.clips, self.settings, self.first)


def hinge_since(training: History, step: int, every: int, names: Iterable[str] = HINGES) -> float | None:
    """The discriminators' mean hinge loss as logged in the last `every` steps; None if it was not."""
    rows = [row for row in training.rows() if row["step"] in range(step - every, step)]
    found = [row[name] for row in rows for name in names if name in row]
    return float(np.mean(found)) if found else None


def best_step(rows: tuple[ValidationRow, ...]) -> int | None:
    """The step of the highest score; of equals the latest, which was trained longest."""
    return max(rows, key=lambda row: (row.score, row.step)).step if rows else None


def best_checkpoint(checkpoints: Path | None, step: int, fingerprint: str) -> dict[str, Tensor]:
    """The tensors of the best step, 0 for none; ValueError says what to do where they are gone."""
    if checkpoints is None or step == 0:
        raise ValueError(
            f"distill.keep is best, but no step of this training was validated ({checkpoints}): it was past them when "
            "validation was turned on; set distill.keep to last, or remove that folder to train anew"
        )
    try:
        return load_checkpoint(checkpoints, step, fingerprint)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"distill.keep is best, which is step {step}, but its checkpoint is unusable ({error}); set distill.keep "
            f"to last, or remove {checkpoints} to train anew"
        ) from error


def write_grid(target: Path, teacher: Tensor, student: Tensor) -> None:
    """Clips as bytes [K, T, H, W, 3] in one picture, a row of frames each: the teacher's, below it the student's."""
    clips = torch.stack([teacher, student], 1).flatten(0, 1)
    rows, frames, height, width, _ = clips.shape
    grid = clips.transpose(1, 2).reshape(rows * height, frames * width, 3)
    draft = target.with_name(f".{target.name}.partial")
    Image.fromarray(grid.numpy()).save(draft, format="png")
    draft.replace(target)


def validation_table(report: ValidationReport, keep: str) -> str:
    """The report as a markdown page: alarms first, then a row a validation."""

    def share(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.3f}"

    lines = [f"- **{alarm.name}**, step {alarm.step}: {alarm.text}" for alarm in report.alarms] or ["No alarm."]
    lines += [
        "",
        "| step | content acc. | motion acc. | content distance | motion distance | flow | flicker | contrast "
        "| hinge | score |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        lines.append(
            f"| {row.step}{' (best)' if row.step == report.best else ''} | {share(row.content_accuracy)} "
            f"| {share(row.motion_accuracy)} | {row.content_distance:.2f} | {row.motion_distance:.2f} "
            f"| {row.flow_ratio:.2f} | {row.flicker_ratio:.2f} | {row.contrast_ratio:.2f} "
            f"| {share(row.discriminator_hinge)} | {row.score:.3f} |"
        )
    t = report.teacher
    lines.append(
        f"| teacher | {share(t.content_accuracy)} | {share(t.motion_accuracy)} | {t.content_distance:.2f} "
        f"| {t.motion_distance:.2f} | 1 | 1 | 1 | | {score(t, t):.3f} |"
    )
    lines += [
        "",
        f"N = {t.clips} test clips that no other stage uses. Flow, flicker and contrast are multiples of the teacher's "
        f"on the same noise. The student has the {keep} averaged weights.",
    ]
    return "\n".join(lines) + "\n"


def _small(clip: Tensor) -> Tensor:
    """Evenly spaced frames of a clip [3, T, H, W], by area averaging made as small as a picture wants them."""
    count, side = clip.shape[1], max(clip.shape[-2:])
    picked = clip[:, torch.linspace(0, count - 1, min(count, SHOWN_FRAMES)).round().long()]
    if side <= SHOWN_SIDE:
        return picked
    height, width = (max(1, round(pixels * SHOWN_SIDE / side)) for pixels in clip.shape[-2:])
    return F.interpolate(picked.transpose(0, 1), (height, width), mode="area").transpose(0, 1)


def _save_whole(tensors: dict[str, Tensor], target: Path) -> None:
    """Write under a temporary name and rename, so that a crash leaves nothing half written."""
    draft = target.with_name(f".{target.name}.partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, draft)
    os.replace(draft, target)
