"""Guesses on units against recovered students, worked by hand."""

import pytest

from tests.evaluation.test_report import make_sensitivity
from tests.evaluation.test_study import row
from tests.tiny import PROVENANCE
from vdmini_core.evaluation.foresight import foresight, foresight_table
from vdmini_core.evaluation.study import PAPER, Arm, Study, StudyReport, study_report

# Removal of every arm and seed, and the recovered content distance. `thin` has fewer channels and keeps all units.
REMOVED = {
    ("paper", 0): ("D.0.0",),
    ("paper", 1): ("D.0.0",),
    ("best", 0): ("D.0.1", "D.1.0"),
    ("best", 1): ("D.0.1", "D.1.0"),
    ("random", 0): ("D.1.1",),
    ("random", 1): ("D.1.0", "D.1.1"),
    ("thin", 0): (),
    ("thin", 1): (),
}
DISTANCES = dict(zip(REMOVED, (10.0, 14.0, 20.0, 30.0, 11.0, 50.0, 1.0, 1.0), strict=True))


def report() -> StudyReport:
    arms = (PAPER, *(Arm(name=name, method=name) for name in ("best", "random", "thin")))
    rows = [row("teacher", None, 1), *(row(f"{arm.name}-pruned", None, 90) for arm in arms)]
    rows += [row(arm, seed, distance) for (arm, seed), distance in DISTANCES.items()]
    return study_report(rows, Study(kind="comparison", arms=arms, seeds=2, steps=2, clips=4), PROVENANCE)


def test_guesses_are_summed_over_units_and_ranked_against_the_means_of_students() -> None:
    found = foresight(report(), REMOVED, make_sensitivity())
    # Content damage and magnitude of the k-th unit are proportional to k: the four students have 0, 1 + 2, 3 and 2 + 3,
    # their distances are 12, 25, 11 and 50. The tie of 3 has ranks 2.5 and 2.5: Spearman's rho by hand is
    # 3 / sqrt(4.5 * 5).
    assert found.students == 4
    rho = 3.0 / (4.5 * 5) ** 0.5
    assert found.correlations["content damage"]["content_distance"] == pytest.approx(rho)
    assert found.correlations["magnitude"]["content_distance"] == pytest.approx(rho)
    assert found.correlations["magnitude"]["motion_distance"] is None  # all students alike
    page = foresight_table(found)
    assert f"{rho:.2f}" in page
    assert "n/a" in page
    assert "over 4 students" in page


def test_an_accuracy_is_worse_where_it_is_lower() -> None:
    rows = [row("teacher", None, 1), row("paper-pruned", None, 9), row("best-pruned", None, 9)]
    rows += [row("paper", 0, 5, accuracy=0.9), row("best", 0, 5, accuracy=0.4)]
    arms = (PAPER, Arm(name="best", method="best"))
    made = study_report(rows, Study(kind="comparison", arms=arms, seeds=1, steps=2, clips=4), PROVENANCE)
    found = foresight(made, REMOVED, make_sensitivity())
    assert found.correlations["magnitude"]["content_accuracy"] == pytest.approx(1)
