"""A study's statistics against cases worked by hand, its arms and parts, and what its table, ranking and plot show."""

from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from tests.tiny import PROVENANCE
from vdmini_core.artifacts import Plan, Quality
from vdmini_core.evaluation.study import (
    CONTROLS,
    LOSSES,
    PAPER,
    Arm,
    Candidate,
    Candidates,
    Part,
    Study,
    StudyReport,
    StudyRow,
    agreement,
    comparison_arms,
    interval,
    probe_arms,
    rank,
    study_metrics,
    study_report,
)
from vdmini_core.evaluation.study_pages import plot_study, ranking_table, study_table
from vdmini_core.pruning.baselines import METHODS
from vdmini_core.settings import DistillSettings, LoopSettings

SETTINGS = DistillSettings(loop=LoopSettings(max_steps=9, batch_size=2), icd_weight=0.3, mca_weight=0.7)
REFERENCES = ("teacher", "pruned")
# By arm, the content distance of seeds 0, 1, 2.
DISTANCES = {
    "task": (10.0, 20.0, 30.0),
    "task+icd": (9.0, 18.0, 27.0),
    "task+mca": (11.0, 21.0, 31.0),
    "task+icd+mca": (5.0, 15.0, 25.0),
}


def row(
    arm: str,
    seed: int | None,
    distance: float,
    *,
    accuracy: float | None = 0.5,
    digest: str = "p",
    parameters: int = 1_000_000,
) -> StudyRow:
    quality = Quality(
        clips=4, content_accuracy=accuracy, motion_accuracy=accuracy, content_distance=distance, motion_distance=1.0
    )
    return StudyRow(
        arm=arm,
        seed=seed,
        steps=2,
        parameters=parameters,
        quality=quality,
        protocol={},
        protocol_digest=digest,
        fingerprint="f",
        provenance=PROVENANCE,
    )


def ablation(seeds: int = 3) -> Study:
    return Study(kind="ablation", arms=LOSSES, seeds=seeds, steps=2, clips=4)


def report_of(seeds: int = 3, accuracy: float | None = 0.5) -> StudyReport:
    rows = [row(name, None, distance, accuracy=accuracy) for name, distance in zip(REFERENCES, (1, 40), strict=True)]
    for arm, distances in DISTANCES.items():
        rows += [row(arm, seed, distances[seed], accuracy=accuracy) for seed in range(seeds)]
    return study_report(rows, ablation(seeds), PROVENANCE)


def test_the_interval_is_the_t_interval_worked_by_hand() -> None:
    # 1, 2, 4.5: mean 2.5, s = sqrt((2.25 + 0.25 + 4) / 2) = 1.802776, t_{.975, 2} = 4.302653 (a table's value).
    found = interval([1.0, 2.0, 4.5])
    assert found.mean == pytest.approx(2.5)
    assert found.high == pytest.approx(2.5 + 4.302653 * 1.802776 / 3**0.5, rel=1e-6)
    assert found.low == pytest.approx(2.5 - 4.302653 * 1.802776 / 3**0.5, rel=1e-6)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = interval([3.0])
    assert (found.mean, found.low, found.high, found.seeds) == (3.0, None, None, 1)


def test_differences_are_taken_seed_by_seed() -> None:
    arms = {arm.arm: arm for arm in report_of().arms}
    # Every seed differs by 5: the difference is certain though the arms' own intervals overlap widely.
    both = arms["task+icd+mca"].differences["content_distance"]
    assert (both.mean, both.low, both.high) == (-5.0, -5.0, -5.0)
    # -1, -2, -3: s = 1, so the half-width is 4.302653 / sqrt(3).
    icd = arms["task+icd"].differences["content_distance"]
    assert icd.mean == pytest.approx(-2)
    assert icd.high == pytest.approx(-2 + 4.302653 / 3**0.5, rel=1e-6)
    assert arms["task"].differences == {}
    assert arms["task"].means["content_distance"].mean == 20


def test_the_table_has_references_arms_and_differences() -> None:
    lines = study_table(report_of()).splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    assert names == [*REFERENCES, *DISTANCES, *(f"{arm} minus task" for arm in list(DISTANCES)[1:])]
    assert "| 20.00 [-4.84, 44.84] |" in lines[4]
    assert "-2.00 [-4.48, +0.48]" in lines[8]


def test_clips_without_labels_have_no_accuracies_anywhere(tmp_path: Path) -> None:
    report = report_of(accuracy=None)
    assert "accuracy |" not in study_table(report)
    assert set(report.arms[0].means) == {"content_distance", "motion_distance"}
    plot_study(report, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 500


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_plot_is_drawn_for_one_seed_and_for_several(tmp_path: Path, seeds: int) -> None:
    plot_study(report_of(seeds), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").format == "PNG"


def test_metrics_have_names_that_mlflow_takes() -> None:
    found = study_metrics(report_of())
    assert found["ablation/content_distance/difference/task-icd-mca"] == -5
    assert not any("+" in name for name in found)


def test_rows_judged_by_different_protocols_are_not_put_together() -> None:
    rows = [row("teacher", None, 1.0), row("pruned", None, 2.0, digest="q")]
    with pytest.raises(
        ValueError, match="the row of pruned, seed None, was judged by another protocol than that of te"
    ):
        study_report(rows, ablation(1), PROVENANCE)


def test_an_arm_changes_its_weights_its_seed_and_its_length_alone() -> None:
    study = Study(kind="ablation", arms=LOSSES, seeds=1, steps=3, clips=4)
    found = [study.arm_settings(SETTINGS, arm, 5) for arm in LOSSES]
    assert [(s.icd_weight, s.mca_weight) for s in found] == [(0, 0), (0.3, 0), (0, 0.7), (0.3, 0.7)]
    for settings in found:
        assert (settings.loop.seed, settings.loop.max_steps) == (5, 3)
        loop = settings.loop.model_copy(update={"seed": SETTINGS.loop.seed, "max_steps": SETTINGS.loop.max_steps})
        assert settings.model_copy(update={"loop": loop, "icd_weight": 0.3, "mca_weight": 0.7}) == SETTINGS


@pytest.mark.parametrize("name", ["icd_weight", "mca_weight"])
def test_a_loss_without_weight_cannot_be_ablated_but_can_train_a_comparison(name: str) -> None:
    without = SETTINGS.model_copy(update={name: 0.0})
    with pytest.raises(ValueError, match=rf"distill\.{name} is 0 in params.yaml"):
        ablation().check(without)
    Study(kind="comparison", arms=(PAPER, *CONTROLS), steps=2, clips=4).check(without)


def test_arms_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="names of arms have to differ: paper, paper"):
        Study(kind="probe", arms=(PAPER, PAPER), steps=2, clips=4).check(SETTINGS)


def test_every_seed_has_every_arm_before_the_next_seed_begins() -> None:
    parts = ablation(2).parts(first_seed=7)
    assert list(parts)[:3] == ["teacher", "pruned", "task-seed7"]
    assert [part.seed for part in parts.values()] == [None, None, 7, 7, 7, 7, 8, 8, 8, 8]


def plan_of(method: str) -> Plan:
    numbers = dict.fromkeys(("teacher_parameters", "student_parameters", "teacher_flops", "student_flops"), 1)
    digests = dict.fromkeys(("report_digest", "teacher_digest"), "a")
    return Plan(method=method, removed=("M",), kept=(), provenance=PROVENANCE, **numbers, **digests)


def test_a_comparison_judges_every_student_before_its_training_too() -> None:
    arms = comparison_arms(plan_of("optimal"))
    parts = Study(kind="comparison", arms=arms, seeds=1, steps=2, clips=4).parts(0)
    names = ["paper", "optimal", "uniform", "random", "magnitude", "depgraph-l2", "depgraph-taylor"]
    assert list(parts) == ["teacher", *(f"{name}-pruned" for name in names), *(f"{name}-seed0" for name in names)]
    assert parts["optimal-pruned"] == Part(Arm(name="optimal", method="units", removed=("M",)), None)


def test_the_current_plan_is_no_arm_of_its_own_where_it_is_the_papers() -> None:
    assert comparison_arms(plan_of("paper")) == (PAPER, *CONTROLS)


def test_further_plans_are_arms_beside_the_current_one() -> None:
    arms = comparison_arms(plan_of("optimal"), (Candidate(name="fast", removed=("M",)),))
    assert [arm.name for arm in arms][:3] == ["paper", "optimal", "fast"]
    assert (arms[2].method, arms[2].removed) == ("units", ("M",))


def test_every_arm_of_the_comparison_has_its_method() -> None:
    assert [arm.method for arm in (PAPER, *CONTROLS)] == list(METHODS)


def comparison_report(odd: int = 1_005_000) -> StudyReport:
    arms = (PAPER, Arm(name="optimal", method="units", removed=("M",)))
    rows = [
        row("teacher", None, 1, parameters=2_000_000),
        row("paper-pruned", None, 90),
        row("optimal-pruned", None, 80),
    ]
    for seed in range(2):
        rows += [row("paper", seed, 10 + seed), row("optimal", seed, 8 + seed, parameters=odd)]
    return study_report(rows, Study(kind="comparison", arms=arms, seeds=2, steps=2, clips=4), PROVENANCE)


def test_the_table_of_a_comparison_has_sizes_and_untrained_students(tmp_path: Path) -> None:
    report = comparison_report()
    lines = study_table(report).splitlines()
    assert lines[2].startswith("| teacher | 2.000 M |")
    assert lines[3].startswith("| paper, untrained | 1.000 M | 0.500 | 0.500 | 90.00 |")
    assert lines[6].startswith("| optimal | 1.005 M |")
    assert "-2.00 [-2.00, -2.00]" in lines[7]
    assert "no equal" not in study_table(report)
    plot_study(report, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").format == "PNG"


def test_a_student_of_another_size_is_named_below_the_table() -> None:
    assert "optimal has -5.0% parameters against paper, so it is no equal." in study_table(comparison_report(950_000))


def test_a_probe_takes_the_first_candidates_beside_the_papers_layout() -> None:
    plans = tuple(Candidate(name=name, removed=(name,), predicted=damage) for name, damage in CANDIDATES.items())
    arms = probe_arms(Candidates(plans=(Candidate(name="paper", removed=()), *plans)), top=2)
    assert [(arm.name, arm.method, arm.removed, arm.predicted) for arm in arms] == [
        ("paper", "paper", (), None),
        ("a", "units", ("a",), 0.1),
        ("b", "units", ("b",), 0.2),
    ]
    with pytest.raises(ValidationError):
        Candidates(plans=())


CANDIDATES = {"a": 0.1, "b": 0.2, "c": 0.3}
# Accuracy before and after recovery: the best plan before is the worst after.
BEFORE, AFTER = {"paper": 0.1, "a": 0.4, "b": 0.3, "c": 0.2}, {"paper": 0.6, "a": 0.5, "b": 0.7, "c": 0.8}


def test_a_probe_ranks_plans_by_what_recovery_made_of_them() -> None:
    arms = (PAPER, *(Arm(name=n, method="units", removed=(n,), predicted=d) for n, d in CANDIDATES.items()))
    rows = [row("teacher", None, 1), *(row(f"{name}-pruned", None, 9, accuracy=x) for name, x in BEFORE.items())]
    rows += [row(name, 0, 5, accuracy=x) for name, x in AFTER.items()]
    report = study_report(rows, Study(kind="probe", arms=arms, seeds=1, steps=2, clips=4), PROVENANCE)
    ranking = rank(report, {"paper": ("M",), **{name: (name,) for name in CANDIDATES}})
    assert [plan.name for plan in ranking.plans] == ["c", "b", "paper", "a"]
    assert ranking.winner == "c"
    # Predicted a, b, c; found c, b, a: the reverse. Before a, b, c, paper; after c, b, paper, a: of six pairs one
    # (b, paper) and another (c, paper) keep their order, so tau = (2 - 4) / 6; rho = 1 - 6 (9 + 0 + 4 + 1) / 60.
    assert ranking.predicted_against_recovered.kendall == pytest.approx(-1)
    assert ranking.predicted_against_recovered.plans == 3
    assert ranking.pruned_against_recovered.kendall == pytest.approx(-2 / 6)
    assert ranking.pruned_against_recovered.spearman == pytest.approx(1 - 6 * 14 / 60)
    page = ranking_table(ranking)
    assert "| 1 | c | 0.300 | 0.200 | 0.800 | c |" in page
    assert "| 3 | paper | n/a | 0.100 | 0.600 | M |" in page
    assert "The winner is c; to go on with it, in params.yaml: `plan: {method: manual, remove: [c]}`." in page


@pytest.mark.parametrize("pairs", [[], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]])
def test_orders_that_cannot_be_compared_agree_in_nothing(pairs: list[tuple[float, float]]) -> None:
    found = agreement(pairs)
    assert (found.kendall, found.spearman, found.plans) == (None, None, len(pairs))
