"""What is wrong with a set of clips, told from how they move, flicker and vary: ratios to other clips, and limits."""

from collections.abc import Mapping

from vdmini_core.settings import ClipAlarmSettings

ADVICE = {
    "motion_collapse": "keep a deep block more in the plan (D.2 and U.1 carry motion), or raise distill.mca_weight",
    "slow_motion": "train longer, raise distill.mca_weight, or keep a deep block more in the plan",
    "flicker": "train longer, raise distill.loop.ema_decay, or lower distill.learning_rate or distill.mca_weight",
    "solid_colour": "lower distill.learning_rate, raise distill.icd_weight, or remove fewer units",
}
"""Alarm -> what to try, where the clips are a student's."""


def collapses(
    ratios: Mapping[str, float],
    limits: ClipAlarmSettings,
    key: str,
    whose: str = "the student's",
    others: str = "the teacher's",
) -> dict[str, str]:
    """Alarm -> what is the matter, for the ratios of the means named in DYNAMICS, `whose` clips to `others`.

    `key` is where the limits are set. Frames of a solid colour have no motion either, so `solid_colour` comes with
    `motion_collapse`; that and `slow_motion` exclude each other.
    """

    def fact(does: str, measure: str, limit: str) -> str:
        value = getattr(limits, limit)
        return f"{whose} clips {does} {ratios[measure]:.2f} times as much as {others}, {key}.{limit} is {value}"

    found: dict[str, str] = {}
    if ratios["flow"] < limits.motion_collapse:
        found["motion_collapse"] = fact("move", "flow", "motion_collapse")
    elif ratios["flow"] < limits.slow_motion:
        found["slow_motion"] = fact("move", "flow", "slow_motion")
    if ratios["flicker"] > limits.flicker:
        found["flicker"] = fact("flicker", "flicker", "flicker")
    if ratios["contrast"] < limits.solid_colour:
        found["solid_colour"] = fact("vary within a frame", "contrast", "solid_colour")
    return found
