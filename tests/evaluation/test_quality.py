"""Judging clips, sharing noise, and the verdicts drawn from the figures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import PROVENANCE, write_latents
from vdmini_core.artifacts import Corner, EvaluationReport, EvaluationRow, Latency, Quality
from vdmini_core.data.synthetic import Label, render_clip
from vdmini_core.evaluation.compare import recovery
from vdmini_core.evaluation.evaluator import Evaluator, Judgement, accuracies, load_evaluator, save_evaluator
from vdmini_core.evaluation.gate import failed_gates
from vdmini_core.evaluation.metrics.frechet import frechet_distance
from vdmini_core.evaluation.quality import compare, decoded_batches, generated_batches, judge, noise_for
from vdmini_core.models import SVD
from vdmini_core.models.sources import evaluator_folder
from vdmini_core.settings import RegisterSettings, SamplerSettings

SHAPE = torch.Size((4, 2, 3, 3))


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    return Evaluator().eval().requires_grad_(False)


def quality(content: float | None, motion: float | None, far: float = 1.0) -> Quality:
    return Quality(clips=4, content_accuracy=content, motion_accuracy=motion, content_distance=far, motion_distance=far)


def report(student: Quality, reduction: float, recovered: dict[str, float | None]) -> EvaluationReport:
    latency = Latency(median_ms=1, p10_ms=1, p90_ms=1, runs=30)
    row = EvaluationRow(name="recovered", parameters=1, flops=1, latency=latency, peak_memory_bytes=1, quality=student)
    return EvaluationReport(
        protocol={},
        protocol_digest="p",
        rows=(row,),
        floor=student,
        parameter_reduction=reduction,
        flop_ratio=0.5,
        latency_ratio=0.5,
        recovery=recovered,
        gallery=(),
        provenance=PROVENANCE,
    )


def test_the_noise_of_a_clip_depends_on_seed_and_index_alone() -> None:
    together = noise_for(3, range(6), SHAPE, "cpu")
    apart = torch.cat([noise_for(3, chunk, SHAPE, "cpu") for chunk in (range(0, 2), range(2, 5), range(5, 6))])
    assert torch.equal(together, apart)
    assert len({value.item() for value in together[:, 0, 0, 0, 0]}) == 6
    assert not torch.equal(noise_for(4, range(6), SHAPE, "cpu"), together)


def test_generated_clips_do_not_depend_on_the_batch_size(tiny_pipeline: SVD, tmp_path: Path) -> None:
    data = write_latents(tmp_path, 3, size=8)
    kept: list[Tensor] = []

    def generate(batch_size: int) -> Tensor:
        settings = SamplerSettings(clips=3, steps=1, batch_size=batch_size)
        batches = generated_batches(tiny_pipeline, tiny_pipeline.denoiser, data, settings, keep=kept.append)
        return torch.cat([clips for clips, _ in batches])

    alone, together = generate(1), generate(2)
    assert alone.shape == (3, 3, 4, 32, 32)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    assert [len(clips) for clips in kept] == [1, 1, 1, 2, 1]


def test_half_precision_is_the_networks_alone(tiny_pipeline: SVD, tmp_path: Path) -> None:
    data = write_latents(tmp_path, 2, size=8)
    seen: list[torch.dtype] = []
    sample = tiny_pipeline.sample

    class Watched(SVD):
        def sample(self, *args: Any, **named: Any) -> Tensor:
            latents = sample(*args, **named)
            seen.append(latents.dtype)
            return latents

    pipeline = Watched(tiny_pipeline.folder, tiny_pipeline.models)
    clips = {}
    for precision in ("fp32", "bf16"):
        settings = SamplerSettings(clips=2, steps=2, precision=precision)  # type: ignore[arg-type]
        clips[precision] = next(generated_batches(pipeline, pipeline.denoiser, data, settings))[0]
    assert clips["bf16"].dtype == torch.float32
    assert seen == [torch.float32, torch.float32]
    assert 0 < (clips["bf16"] - clips["fp32"]).abs().mean() < 0.02


def test_real_clips_are_those_the_vae_shows(tiny_pipeline: SVD, tmp_path: Path) -> None:
    data = write_latents(tmp_path, 3, size=8)
    ((clips, labels),) = decoded_batches(tiny_pipeline, data, 2, SamplerSettings(batch_size=2), first=1)
    assert torch.equal(clips, tiny_pipeline.decode(data.rows([1, 2])["latents"]))
    assert len(labels) == 2


def batches(count: int, label: int) -> Iterator[tuple[Tensor, Tensor]]:
    for index in range(count):
        clips = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(index)) * 2 - 1
        yield clips, torch.full((2, 3), label)


def test_unlabelled_clips_have_distances_but_no_accuracy(evaluator: Evaluator) -> None:
    judged = judge(batches(2, -1), evaluator)
    found = compare(judged, judged)
    assert (found.content_accuracy, found.motion_accuracy, found.clips) == (None, None, 4)
    assert max(found.content_distance, found.motion_distance) < 1e-6


def test_accuracy_counts_the_clips_that_are_told_right() -> None:
    def answers(labels: list[int], classes: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(labels), classes).float()

    unused = torch.zeros(5, 64)
    judgement = Judgement(
        frames=unused[:, None],
        content=unused,
        motion=unused,
        shape_logits=answers([0, 1, 2, 3, 0], 4),
        colour_logits=answers([5, 0, 2, 3, 4], 6),
        beacon_logits=answers([8, 7, 0, 5, 4], 9),
        motion_logits=answers([8, 7, 0, 0, 0], 9),
    )
    # Right but for: nothing, the shape, the colour, the beacon, the beacon and the motion.
    labels = torch.tensor([[0, 5, 8], [2, 0, 7], [2, 3, 0], [3, 3, 0], [0, 4, 3]])
    content, motion = accuracies(judgement, labels)
    assert content.tolist() == [True, False, False, False, False]
    assert motion.tolist() == [True, True, True, True, False]


def test_the_shipped_evaluator_sees_what_happens_around_the_shape() -> None:
    evaluator = load_evaluator(evaluator_folder())
    labels = [Label(shape % 4, shape % 6, shape % 9) for shape in range(36)]
    frames = [render_clip(label, np.random.default_rng(i), frames=8, size=64) for i, label in enumerate(labels)]
    truth = torch.tensor([(label.shape, label.colour, label.motion) for label in labels])
    clips = torch.from_numpy(np.stack(frames)).movedim(-1, 1).float() / 127.5 - 1
    whole = evaluator(clips)
    assert accuracies(whole, truth)[0].float().mean() > 0.9

    outer = torch.ones(64, 64, dtype=torch.bool)
    outer[10:54, 10:54] = False
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(36, 3, 16, 16, generator=generator).repeat_interleave(4, -1).repeat_interleave(4, -2)
    damaged = torch.where(outer, 0.5 * coarse[:, :, None] - 0.1, clips)  # beacons gone, shapes in place
    assert accuracies(evaluator(damaged), truth)[0].float().mean() < 0.5

    def distance(other: Tensor) -> float:
        return frechet_distance(whole.content.numpy(), evaluator(other).content.numpy())

    assert distance(damaged) > 100 * max(distance(clips.flip(2)), 0.01)


def test_a_still_clip_has_no_motion_and_frame_order_no_content(evaluator: Evaluator) -> None:
    clips = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    still = [evaluator(clip[:, :, :1].expand(-1, -1, 4, -1, -1)).motion for clip in (clips, -clips)]
    torch.testing.assert_close(still[0], still[1])
    torch.testing.assert_close(evaluator(clips).content, evaluator(clips.flip(2)).content)


def test_a_saved_evaluator_judges_as_before_but_for_half_precision(evaluator: Evaluator, tmp_path: Path) -> None:
    save_evaluator(evaluator, tmp_path)
    clips = next(batches(1, 0))[0]
    torch.testing.assert_close(load_evaluator(tmp_path)(clips).motion, evaluator(clips).motion, rtol=0.02, atol=0.01)


def test_recovery_is_the_closed_share_of_the_gap() -> None:
    rows = {"teacher": quality(0.9, None, 2.0), "pruned": quality(0.1, None, 10.0)}
    found = recovery({**rows, "recovered": quality(0.7, None, 12.0)})
    assert found["content_accuracy"] == pytest.approx(0.75)
    assert found["motion_accuracy"] is None
    assert found["content_distance"] == pytest.approx(-0.25)


def test_there_is_nothing_to_recover_where_pruning_did_no_harm() -> None:
    rows = {"teacher": quality(0.5, 0.9, 2.0), "pruned": quality(0.5, 0.95, 2.0), "recovered": quality(0.4, 0.9, 3.0)}
    assert set(recovery(rows).values()) == {None}


FULL = {"content_accuracy": 1.0, "motion_accuracy": 1.0, "content_distance": 1.0, "motion_distance": 1.0}


def test_a_student_that_meets_every_threshold_passes() -> None:
    assert failed_gates(report(quality(0.9, 0.9), 0.4, FULL), RegisterSettings()) == []


def test_with_a_compressed_decoder_the_gate_judges_what_would_be_registered() -> None:
    whole = report(quality(0.9, 0.9), 0.4, FULL)
    rows = tuple(
        whole.rows[0].model_copy(update={"name": name, "quality": quality(*accuracies)})
        for name, accuracies in (("teacher", (1.0, 1.0)), ("pruned", (0.1, 0.1)), ("recovered", (0.9, 0.9)))
    )
    corner = Corner(
        denoiser="recovered",
        decoder="compressed",
        parameters=1,
        quality=quality(0.9, 0.37),
        flicker_ratio=1,
        stages={},
    )
    without = whole.model_copy(update={"rows": rows})
    assert failed_gates(without, RegisterSettings()) == []
    failed = failed_gates(without.model_copy(update={"corners": (corner,)}), RegisterSettings(min_motion_accuracy=0.5))
    assert failed == [
        "motion accuracy is 0.370, register.min_motion_accuracy is 0.5",
        "0.300 of the gap in motion accuracy was closed, register.min_motion_recovery is 0.5",
    ]


def test_every_missed_threshold_is_one_sentence_with_its_key() -> None:
    settings = RegisterSettings(min_content_accuracy=0.8, min_motion_accuracy=0.8)
    failed = failed_gates(report(quality(0.5, 0.9), 0.1, {**FULL, "motion_accuracy": 0.25}), settings)
    assert failed == [
        "parameters fell by 0.100, register.min_parameter_reduction is 0.2",
        "content accuracy is 0.500, register.min_content_accuracy is 0.8",
        "0.250 of the gap in motion accuracy was closed, register.min_motion_recovery is 0.5",
    ]


def test_without_labels_the_gate_judges_recovery_by_distance() -> None:
    recovered = {**FULL, "content_accuracy": None, "motion_accuracy": None, "content_distance": 0.4}
    settings = RegisterSettings(min_content_accuracy=0.9)
    failed = failed_gates(report(quality(None, None), 0.4, recovered), settings)
    assert failed == ["0.400 of the gap in content distance was closed, register.min_content_recovery is 0.5"]


def test_where_pruning_opened_no_gap_there_is_no_recovery_to_demand() -> None:
    recovered = dict.fromkeys(FULL)
    assert failed_gates(report(quality(0.9, 0.9), 0.4, recovered), RegisterSettings()) == []
