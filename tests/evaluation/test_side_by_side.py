"""Teacher and students beside each other: pairs stay pairs, whatever the batch; what a row's clips come to."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import PROVENANCE, write_latents
from vdmini_core.artifacts import EvaluationReport, Latency
from vdmini_core.data.latents import LatentCache
from vdmini_core.evaluation.compare import ROWS, corners_table, decoder_alarms, evaluate_rows, flat_metrics, summary
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.evaluation.metrics.paired import cosine_distance, paired, see
from vdmini_core.evaluation.metrics.pixels import MOST_PSNR, pixel_measures
from vdmini_core.evaluation.quality import generated_batches
from vdmini_core.evaluation.report_rows import corners_section, waterfall
from vdmini_core.evaluation.side_by_side import (
    PAIRED_MEASURES,
    RowClips,
    diversity,
    estimates,
    generate_rows,
    with_decoder,
)
from vdmini_core.evaluation.stage_times import STAGES
from vdmini_core.models import SVD
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.pruning.surgery import save_model
from vdmini_core.settings import EvaluateSettings

SETTINGS = EvaluateSettings(clips=5, steps=1, batch_size=2, gallery=1, diversity=3, end_to_end_runs=2)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    return Evaluator().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return write_latents(tmp_path_factory.mktemp("latents"), 10, size=8)


@pytest.fixture(scope="module")
def rows(tiny_pipeline: SVD, data: LatentCache, evaluator: Evaluator) -> dict[str, RowClips]:
    teacher = tiny_pipeline.denoiser
    denoisers = {"pruned": teacher.without(("M",)), "teacher": teacher, "recovered": teacher}
    return generate_rows(tiny_pipeline, denoisers, data, evaluator, SETTINGS)


def clips_of(pipeline: SVD, data: LatentCache, removed: tuple[str, ...] = (), seed: int = 0) -> Tensor:
    denoiser = pipeline.denoiser.without(removed) if removed else pipeline.denoiser
    settings = SETTINGS.model_copy(update={"batch_size": 5, "seed": seed})
    return next(generated_batches(pipeline, denoiser, data, settings))[0]


def test_the_measures_of_a_pair_are_those_of_its_clips_alone(
    rows: dict[str, RowClips], tiny_pipeline: SVD, data: LatentCache, evaluator: Evaluator
) -> None:
    student, teacher = clips_of(tiny_pipeline, data, ("M",)), clips_of(tiny_pipeline, data)
    found = rows["pruned"].pairs
    expected = pixel_measures(student, teacher) | paired(see(student, evaluator), see(teacher, evaluator))
    for name in ("psnr", "ssim", "flow_error"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["feature_cosine"], 1 - expected["content"], rtol=0, atol=1e-4)
    assert all(value.shape == (5,) for value in found.values())
    assert found["psnr"].unique().numel() == 5


def test_a_student_that_is_the_teacher_equals_it_in_every_measure(rows: dict[str, RowClips]) -> None:
    reference = rows["teacher"].judged
    found = estimates(rows["recovered"], rows["teacher"], reference, 0)
    exact = {"psnr": MOST_PSNR, "flow_error": 0.0}
    for name in set(PAIRED_MEASURES) - {"lpips", "dreamsim"}:
        assert found[name].value == pytest.approx(exact.get(name, 1.0), abs=1e-6), name
        assert found[name].low == found[name].high == pytest.approx(found[name].value)


def test_the_teacher_has_no_pairs_with_itself(rows: dict[str, RowClips]) -> None:
    found = estimates(rows["teacher"], None, rows["teacher"].judged, 0)
    assert set(found) == {"content_accuracy", "motion_accuracy", "content_diversity", "motion_diversity"}


def test_diversity_is_of_clips_of_the_same_condition_from_different_seeds(
    rows: dict[str, RowClips], tiny_pipeline: SVD, data: LatentCache, evaluator: Evaluator
) -> None:
    a, b = (evaluator(clips_of(tiny_pipeline, data, seed=seed)[:3]) for seed in (0, 1))
    expected = cosine_distance(a.motion, b.motion)
    torch.testing.assert_close(rows["teacher"].diversity["motion_diversity"], expected, rtol=1e-2, atol=1e-5)
    assert expected.min() > 0


def test_diversity_is_a_mean_over_pairs_of_seeds() -> None:
    def seed(*vectors: list[float]) -> tuple[Tensor, Tensor]:
        values = torch.tensor(vectors)
        return values[:, None].expand(-1, 2, -1), values

    east, north = [1.0, 0.0], [0.0, 2.0]
    found = diversity([seed(east, east), seed(east, north), seed(east, north)])
    assert found["motion_diversity"].tolist() == pytest.approx([0.0, 2 / 3])
    assert torch.equal(found["content_diversity"], found["motion_diversity"])


def test_clips_are_not_kept_beyond_their_batch(tiny_pipeline: SVD, data: LatentCache, evaluator: Evaluator) -> None:
    teacher = tiny_pipeline.denoiser
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def keep(name: str, clips: Tensor) -> None:
        held.append(weakref.ref(clips))
        alive.append(sum(found() is not None for found in held))

    settings = SETTINGS.model_copy(update={"clips": 6, "batch_size": 1, "diversity": 0})
    generate_rows(tiny_pipeline, {"teacher": teacher, "pruned": teacher}, data, evaluator, settings, keep)
    assert len(held) == 12
    assert max(alive) <= 4  # two of this batch, and until they are replaced two of the one before


@pytest.fixture(scope="module")
def report(
    tiny_pipeline: SVD, data: LatentCache, evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationReport:
    """The tiny teacher, also as the recovered student. Peak memory, in processes, is left to the stages' tests."""
    folder = tmp_path_factory.mktemp("students")
    save_model(tiny_pipeline.denoiser.without(("M",)), folder / "pruned")
    settings = SETTINGS.model_copy(update={"latency_runs": 2, "latency_warmup": 0})  # fewer than may be set
    students = {"pruned": folder / "pruned", "recovered": tiny_pipeline.folder / "unet"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vdmini_core.evaluation.compare.peak_memory_bytes", lambda *_: 1)
        return evaluate_rows(tiny_pipeline, students, data, evaluator, settings, folder / "clips", {}, PROVENANCE)


def test_every_row_has_intervals_around_its_values_and_times_of_its_stages(report: EvaluationReport) -> None:
    for row in report.rows:
        assert row.intervals["content_accuracy"].value == row.quality.content_accuracy
        assert all(e.low <= e.value + 1e-9 and e.value <= e.high + 1e-9 for e in row.intervals.values())
        assert tuple(row.stages) == STAGES
        parts, whole = [row.stages[name] for name in STAGES[:-1]], row.stages["end_to_end"]
        assert {stage.runs for stage in row.stages.values()} == {2}
        assert sum(stage.median_ms for stage in parts) == pytest.approx(whole.median_ms)  # of two runs it is the mean
    assert not report.rows[2].alarms  # the teacher itself
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report


def test_the_metrics_have_every_interval_s_value_under_its_name(report: EvaluationReport) -> None:
    found = flat_metrics(report)
    pruned = report.rows[1]
    assert found["paired/psnr/pruned"] == pruned.intervals["psnr"].value
    assert found["quality/motion_diversity/teacher"] == report.rows[0].intervals["motion_diversity"].value
    assert found["speed/stage_ms/vae_decode/pruned"] == pruned.stages["vae_decode"].median_ms
    assert {name for name in found if name.startswith("paired/") and name.endswith("teacher")} == set()
    assert {f"quality/alarms/{name}" for name in ROWS} <= set(found)
    assert all(np.isfinite(value) for value in found.values())


def test_the_summary_shows_pairs_and_alarms(report: EvaluationReport) -> None:
    rows = list(report.rows)
    rows[1] = rows[1].model_copy(update={"alarms": {"flicker": "too much of it"}})
    text = summary(report.model_copy(update={"rows": tuple(rows)}))
    psnr = rows[1].intervals["psnr"]
    assert f"| pruned | {psnr.value:.3g} ({psnr.low:.3g} to {psnr.high:.3g}) |" in text
    assert "- **flicker**: too much of it\n" in text


def test_students_without_a_pair_have_no_table_of_pairs(report: EvaluationReport, tmp_path: Path) -> None:
    rows = tuple(row.model_copy(update={"intervals": {}, "stages": {}}) for row in report.rows)
    assert "beside the teacher" not in summary(report.model_copy(update={"rows": rows}))
    assert isinstance(rows[0].latency, Latency)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_latents_decoded_by_the_same_decoder_twice_are_the_same_clips(
    tiny_pipeline: SVD, data: LatentCache, evaluator: Evaluator, precision: str
) -> None:
    settings = SETTINGS.model_copy(update={"clips": 3, "diversity": 0, "precision": precision})
    denoisers = {"teacher": tiny_pipeline.denoiser, "recovered": tiny_pipeline.denoiser.without(("M",))}
    found = generate_rows(tiny_pipeline, denoisers, data, evaluator, settings, compressed=tiny_pipeline)
    assert list(found) == ["teacher, compressed decoder", "recovered, compressed decoder", "teacher", "recovered"]
    for name in denoisers:
        assert torch.equal(found[with_decoder(name)].judged.content, found[name].judged.content)
        assert torch.equal(found[with_decoder(name)].dynamics, found[name].dynamics)
    assert (found[with_decoder("teacher")].pairs["psnr"] == MOST_PSNR).all()


def test_what_a_decoder_does_to_clips_is_said_beside_the_other_decoders(
    rows: dict[str, RowClips],
) -> None:
    still = RowClips(rows["recovered"].judged, rows["recovered"].dynamics * 0, {})
    made = {**rows, with_decoder("recovered"): still, with_decoder("teacher"): rows["teacher"]}
    assert decoder_alarms("teacher", made, SETTINGS.alarms) == {}
    found = decoder_alarms("recovered", made, SETTINGS.alarms)
    assert set(found) == {"motion_collapse", "solid_colour"}
    assert all("the compressed decoder's clips" in text and "raise decoder.ratio" in text for text in found.values())


def test_four_corners_have_a_decoder_each_and_no_speed_up_from_few_runs(
    tiny_pipeline: SVD, data: LatentCache, evaluator: Evaluator, tmp_path: Path
) -> None:
    students = {name: tmp_path / name for name in ROWS[1:]}
    for name, folder in students.items():
        save_model(tiny_pipeline.denoiser.without(("M",)) if name == "pruned" else tiny_pipeline.denoiser, folder)
    save_model(VAEDecoder(tiny_pipeline.vae).without(("M",)), tmp_path / "vae")
    settings = SETTINGS.model_copy(update={"clips": 4, "diversity": 0, "end_to_end_runs": 1})
    report = evaluate_rows(
        tiny_pipeline, students, data, evaluator, settings, tmp_path, {}, PROVENANCE, vae=tmp_path / "vae"
    )
    teacher, smaller, student, both = report.corners
    assert (teacher.quality, student.quality) == (report.rows[0].quality, report.rows[2].quality)
    assert teacher.flicker_ratio == 1
    assert smaller.parameters - teacher.parameters == both.parameters - student.parameters < 0
    assert smaller.quality == both.quality != teacher.quality  # this student is the teacher
    lines = corners_table(report.corners)
    assert lines[2].startswith("| teacher | original | ")
    assert "a speed-up needs 30" in lines[-2]
    page = waterfall({row.name: row for row in report.rows}, report.corners)
    assert "<h3>recovered, compressed decoder</h3>" in page
    assert corners_section(report.corners).count("<tr>") == 5
    assert corners_section(()) == ""
    metrics = flat_metrics(report)
    assert metrics["corner/end_to_end_ms/recovered_compressed"] == both.stages["end_to_end"].median_ms
