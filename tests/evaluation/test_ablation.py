"""The ablation's statistics against a case worked by hand, and what its table and plot show."""

from pathlib import Path

import pytest
from PIL import Image

from tests.tiny import PROVENANCE
from vdmini_core.artifacts import Quality
from vdmini_core.evaluation.ablation import (
    ARMS,
    REFERENCES,
    AblationReport,
    AblationRow,
    AblationSettings,
    ablation_metrics,
    ablation_report,
    ablation_table,
    arm_settings,
    check_weights,
    interval,
    plot_ablation,
)
from vdmini_core.settings import DistillSettings, LoopSettings

SETTINGS = DistillSettings(loop=LoopSettings(max_steps=9, batch_size=2), icd_weight=0.3, mca_weight=0.7)
# By arm, the content distance of seeds 0, 1, 2.
DISTANCES = {
    "task": (10.0, 20.0, 30.0),
    "task+icd": (9.0, 18.0, 27.0),
    "task+mca": (11.0, 21.0, 31.0),
    "task+icd+mca": (5.0, 15.0, 25.0),
}


def row(arm: str, seed: int | None, distance: float, *, accuracy: float | None = 0.5, digest: str = "p") -> AblationRow:
    quality = Quality(
        clips=4, content_accuracy=accuracy, motion_accuracy=accuracy, content_distance=distance, motion_distance=1.0
    )
    return AblationRow(
        arm=arm,
        seed=seed,
        steps=2,
        quality=quality,
        protocol={},
        protocol_digest=digest,
        fingerprint="f",
        provenance=PROVENANCE,
    )


def report_of(seeds: int = 3, accuracy: float | None = 0.5) -> AblationReport:
    rows = [row(name, None, distance, accuracy=accuracy) for name, distance in zip(REFERENCES, (1, 40), strict=True)]
    for arm, distances in DISTANCES.items():
        rows += [row(arm, seed, distances[seed], accuracy=accuracy) for seed in range(seeds)]
    return ablation_report(rows, AblationSettings(seeds=seeds, steps=2, clips=4), PROVENANCE)


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
    lines = ablation_table(report_of()).splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    assert names == [*REFERENCES, *ARMS, *(f"{arm} minus task" for arm in list(ARMS)[1:])]
    assert "| 20.00 [-4.84, 44.84] |" in lines[4]
    assert "-2.00 [-4.48, +0.48]" in lines[8]


def test_clips_without_labels_have_no_accuracies_anywhere(tmp_path: Path) -> None:
    report = report_of(accuracy=None)
    assert "accuracy |" not in ablation_table(report)
    assert set(report.arms[0].means) == {"content_distance", "motion_distance"}
    plot_ablation(report, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 500


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_plot_is_drawn_for_one_seed_and_for_several(tmp_path: Path, seeds: int) -> None:
    plot_ablation(report_of(seeds), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").format == "PNG"


def test_metrics_have_names_that_mlflow_takes() -> None:
    found = ablation_metrics(report_of())
    assert found["ablation/content_distance/difference/task-icd-mca"] == -5
    assert not any("+" in name for name in found)


def test_rows_judged_by_different_protocols_are_not_put_together() -> None:
    rows = [row("teacher", None, 1.0), row("pruned", None, 2.0, digest="q")]
    with pytest.raises(
        ValueError, match="the row of pruned, seed None, was judged by another protocol than that of te"
    ):
        ablation_report(rows, AblationSettings(seeds=1, steps=2, clips=4), PROVENANCE)


def test_an_arm_changes_its_weights_its_seed_and_its_length_alone() -> None:
    found = {arm: arm_settings(SETTINGS, arm, 5, 3) for arm in ARMS}
    assert [(s.icd_weight, s.mca_weight) for s in found.values()] == [(0, 0), (0.3, 0), (0, 0.7), (0.3, 0.7)]
    for settings in found.values():
        assert (settings.loop.seed, settings.loop.max_steps) == (5, 3)
        loop = settings.loop.model_copy(update={"seed": SETTINGS.loop.seed, "max_steps": SETTINGS.loop.max_steps})
        assert settings.model_copy(update={"loop": loop, "icd_weight": 0.3, "mca_weight": 0.7}) == SETTINGS


@pytest.mark.parametrize("name", ["icd_weight", "mca_weight"])
def test_a_loss_without_weight_cannot_be_ablated(name: str) -> None:
    with pytest.raises(ValueError, match=rf"distill\.{name} is 0 in params.yaml"):
        check_weights(SETTINGS.model_copy(update={name: 0.0}))


def test_every_seed_has_every_arm_before_the_next_seed_begins() -> None:
    parts = AblationSettings(seeds=2, steps=1, clips=2).parts(first_seed=7)
    assert list(parts)[:3] == ["teacher", "pruned", "task-seed7"]
    assert [seed for _, seed in parts.values()] == [None, None, 7, 7, 7, 7, 8, 8, 8, 8]
