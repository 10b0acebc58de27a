"""Watches a decoder's recovery: every so many steps the averaged decoder decodes held-out latents, which are compared
with the original decoder's clips of the same latents. Nothing here changes the training."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from vdmini_core.artifacts import Alarm, DecoderReport, RecoveryRow
from vdmini_core.data.latents import LatentCache
from vdmini_core.distillation.alarms import all_raised, raised
from vdmini_core.distillation.validation import hinge_since
from vdmini_core.evaluation.metrics.dynamics import DYNAMICS, dynamics
from vdmini_core.evaluation.quality import SMALLEST
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.pruning.decoder_plan import describe_decoder_plan
from vdmini_core.pruning.decoder_sensitivity import clips_of, reconstruction, sensitivity_table
from vdmini_core.reporting import Log, silent_log
from vdmini_core.settings import DecoderSettings
from vdmini_core.training.history import History

SECTION = "decoder"
HINGES = ("train/discriminator/total",)

logger = logging.getLogger(__name__)


class RecoveryWatch:
    """The rows of one recovery, on disk in `folder`; a resumed training finds them again."""

    def __init__(
        self,
        original: VAEDecoder,
        data: LatentCache,
        settings: DecoderSettings,
        training: History,
        folder: Path,
        device: torch.device,
        *,
        log: Log = silent_log,
        alert: Callable[[Alarm], None] = lambda alarm: None,
    ) -> None:
        self.settings, self.training, self.log, self.alert = settings, training, log, alert
        self.latents = data.rows(list(range(min(settings.validation.clips, len(data)))))["latents"].to(device)
        self.target = clips_of(original, self.latents)
        self.dynamics = dynamics(self.target).mean(0)
        self.history = History(folder / "recovery.jsonl")
        self._rows = {int(row["step"]): RecoveryRow.model_validate(row) for row in self.history.rows()}

    def __call__(self, step: int, student: VAEDecoder) -> None:
        """Judge the averaged student as it is after `step` steps."""
        clips = clips_of(student, self.latents)
        found = reconstruction(clips, self.target)
        ratios = dynamics(clips).mean(0) / self.dynamics.clamp_min(SMALLEST)
        row = RecoveryRow(
            step=step,
            psnr=found.psnr,
            ssim=found.ssim,
            **{f"{name}_ratio": float(ratio) for name, ratio in zip(DYNAMICS, ratios, strict=True)},
            discriminator_hinge=hinge_since(self.training, step, self.settings.validation.every, HINGES),
        )
        self._rows[step] = row
        values = row.model_dump(exclude={"step"}, exclude_none=True)
        self.history.log(values, step)
        self.log({f"recovery/{name}": value for name, value in values.items()}, step)
        for alarm in raised(self._trained(step), self.settings.validation.alarms, SECTION):
            logger.warning("step %d, alarm %s: %s", alarm.step, alarm.name, alarm.text)
            self.alert(alarm)

    def rows(self, step: int) -> tuple[RecoveryRow, ...]:
        """What was seen in the first `step` steps, in order; a resumed training repeats what came after."""
        return tuple(self._rows[done] for done in sorted(self._rows) if done <= step)

    def _trained(self, step: int) -> tuple[RecoveryRow, ...]:
        return tuple(row for row in self.rows(step) if row.step > 0)

    def alarms(self, step: int) -> tuple[Alarm, ...]:
        """Every alarm of the first `step` steps; before any of them it is the plan's damage, not the training's."""
        return all_raised(self._trained(step), self.settings.validation.alarms, SECTION)


def decoder_page(report: DecoderReport) -> str:
    """The report as a markdown page: plan, quality and time, recovery curve, sensitivity."""
    lines = [describe_decoder_plan(report.plan)]
    if report.alarms:
        lines += [f"- **{alarm.name}**, step {alarm.step}: {alarm.text}" for alarm in report.alarms] + [""]
    flickers = f"flicker (real: {report.real_flicker:.4f})"
    lines += [f"| beside {report.clips} real held-out clips | PSNR dB | SSIM | {flickers} |", "|---|---|---|---|"]
    for name, quality in report.quality.items():
        lines.append(f"| {name} | {quality.psnr:.2f} | {quality.ssim:.4f} | {quality.flicker:.4f} |")
    before, after = report.latencies["original"], report.latencies["recovered"]
    lines += [
        "",
        f"Decoding one clip: {before.median_ms:.2f} -> {after.median_ms:.2f} ms, "
        f"{report.time_ratio:.3f} of the time (medians of {before.runs})"
        f"{'' if (ratio := report.plan.predicted_ratio) is None else f', {ratio:.3f} was predicted'}.",
        "",
        "| step | PSNR dB to the original decoder | SSIM | flicker | flow | hinge |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.curve:
        hinge = "" if row.discriminator_hinge is None else f"{row.discriminator_hinge:.3f}"
        ratios = f"{row.flicker_ratio:.3f} | {row.flow_ratio:.3f}"
        lines.append(f"| {row.step} | {row.psnr:.2f} | {row.ssim:.4f} | {ratios} | {hinge} |")
    lines += [
        "",
        "Flicker and flow are multiples of the original decoder's. Nothing is chosen by these clips.",
        "",
        "Before any training, beside the original decoder's clips of the same latents:",
        "",
        sensitivity_table(report.sensitivity),
    ]
    return "\n".join(lines)
