"""Whether what is measured on single units foresees how students fare after recovery: rank correlations over students.

A student's guess is the sum over the units it is without, as a planner adds them up.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping

from vdmini_core.artifacts import Record, SensitivityReport
from vdmini_core.evaluation.study import MEASURES, StudyReport, agreement

Removal = tuple[str, ...]


class Foresight(Record):
    """Spearman's rho, by guess and measure, of the guess with how bad the recovered students are; 1 is perfect.

    None where all guesses are alike. `students` differ in the units they are without.
    """

    students: int
    correlations: dict[str, dict[str, float | None]]


def foresight(study: StudyReport, removed: Mapping[tuple[str, int], Removal], units: SensitivityReport) -> Foresight:
    """Compare the guesses of `units` with the trained rows of a study.

    `removed` are the units that the student of an arm and a seed is without. Students that keep every unit, as after
    channel pruning, are left out; those without the same units count once, with their mean.
    """
    trained: dict[Removal, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in study.rows:
        if row.seed is not None and (names := removed[row.arm, row.seed]):
            for measure in study.arms[0].means:
                trained[names][measure].append(badness(measure, float(getattr(row.quality, measure))))
    students = list(trained)
    return Foresight(
        students=len(students),
        correlations={
            guess: {
                measure: agreement(
                    [(sum(of[unit] for unit in names), statistics.mean(trained[names][measure])) for names in students]
                ).spearman
                for measure in study.arms[0].means
            }
            for guess, of in unit_guesses(units).items()
        },
    )


def badness(measure: str, value: float) -> float:
    """The value, turned around where more of it is better."""
    return -value if measure.endswith("accuracy") else value


def unit_guesses(units: SensitivityReport) -> dict[str, dict[str, float]]:
    """By name, what each guess says of every unit: both measured damages, and the criteria."""
    names = list(units.scores[0].criteria)
    return {
        "content damage": {unit.name: unit.content.value for unit in units.scores},
        "motion damage": {unit.name: unit.motion.value for unit in units.scores},
        **{name.replace("_", " "): {unit.name: unit.criteria[name] for unit in units.scores} for name in names},
    }


def foresight_table(found: Foresight) -> str:
    """Markdown: a row for each guess, a column for each measure."""
    measures = [MEASURES[name] for name in next(iter(found.correlations.values()))]
    lines = [["summed over removed units", *measures], ["---"] * (len(measures) + 1)]
    for guess, of in found.correlations.items():
        lines.append([guess, *("n/a" if value is None else f"{value:.2f}" for value in of.values())])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"Spearman's correlation of guesses with how bad recovered students are (1: it orders them right), over "
        f"{found.students} students that lack units:\n\n{table}\n"
    )
