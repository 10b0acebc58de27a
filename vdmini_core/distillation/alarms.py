"""What goes wrong in a recovery, read off its validations: pure functions of the figures, each with what to try."""

from collections.abc import Sequence

from vdmini_core.artifacts import Alarm, WatchedRow
from vdmini_core.evaluation.collapse import ADVICE, collapses
from vdmini_core.settings import AlarmSettings

DECODER_ADVICE = {
    "motion_collapse": "train longer, raise decoder.temporal_weight, or set decoder.ratio higher",
    "slow_motion": "train longer, or raise decoder.temporal_weight",
    "flicker": "raise decoder.temporal_weight or decoder.loop.ema_decay, or lower decoder.adversarial_weight",
    "solid_colour": "lower decoder.learning_rate, or set decoder.ratio higher",
}


def alarms(rows: Sequence[WatchedRow], limits: AlarmSettings, section: str = "distill") -> tuple[Alarm, ...]:
    """The alarms that hold after the last of the rows, which are in the order of their steps; none without a row.

    `section` of the settings, distill or decoder, is what is to be changed. A frame of a solid colour has no motion
    either, so `solid_colour` comes with `motion_collapse`.
    """
    if not rows:
        return ()
    last = rows[-1]
    ratios = {"flow": last.flow_ratio, "flicker": last.flicker_ratio, "contrast": last.contrast_ratio}
    facts = collapses(ratios, limits, f"{section}.validation.alarms")
    advice = ADVICE if section == "distill" else DECODER_ADVICE
    found = {name: f"{fact}; {advice[name]}" for name, fact in facts.items()}
    recent = rows[-limits.patience :]
    hinges = [row.discriminator_hinge for row in recent if row.discriminator_hinge is not None]
    if len(hinges) == limits.patience and max(hinges) < limits.discriminator_won:
        found["discriminator_won"] = (
            f"the discriminator's hinge loss was at most {max(hinges):.3f} for {limits.patience} validations (2 is "
            f"chance, 0 has won), {section}.validation.alarms.discriminator_won is {limits.discriminator_won}; its "
            f"gradient says little: lower {section}.discriminator.learning_rate, or its warmup_steps"
        )
    return tuple(Alarm(name=name, step=last.step, text=text) for name, text in found.items())


def raised(rows: Sequence[WatchedRow], limits: AlarmSettings, section: str = "distill") -> tuple[Alarm, ...]:
    """The alarms of the last row that did not hold after the row before it."""
    before = {alarm.name for alarm in alarms(rows[:-1], limits, section)}
    return tuple(alarm for alarm in alarms(rows, limits, section) if alarm.name not in before)


def all_raised(rows: Sequence[WatchedRow], limits: AlarmSettings, section: str = "distill") -> tuple[Alarm, ...]:
    """Every alarm of a training, at the step that raised it; one that went and came back counts twice."""
    return tuple(alarm for count in range(1, len(rows) + 1) for alarm in raised(rows[:count], limits, section))
