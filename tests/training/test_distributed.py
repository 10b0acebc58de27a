"""Micro-batches and processes change how a step is computed, not what: one loss curve, to rounding."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file
from torch import distributed

from tests.tiny import EMBEDDING, FRAMES, new_inputs, output_of, write_latents
from vdmini_core.data.latents import LatentCache
from vdmini_core.diffusion.process import VPrediction
from vdmini_core.distillation.icmd import distill
from vdmini_core.models import UNetDenoiser
from vdmini_core.settings import DiscriminatorSettings, DistillSettings, LoopSettings, ValidationSettings
from vdmini_core.training.distributed import is_main
from vdmini_core.training.history import History
from vdmini_core.training.loop import NonFiniteLoss

REMOVED = ("M",)
STEPS, KEPT_AT = 20, 14
SEEN_AT, BEST = (3, 6), 3
SPOILT = 5
TOGETHER = ("ddp", "fsdp2")


def new_teacher() -> UNetDenoiser:
    """SVD's layout in two stages.

    The four of `new_unet` end in a grid of 1 x 1, which is what a norm of one channel makes zero of: what is left is
    rounding, Adam makes whole steps of it, and after 20 of them two trainings have no more than the task in common.
    """
    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        num_attention_heads=(1, 2),
        cross_attention_dim=EMBEDDING,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=FRAMES,
    )
    return UNetDenoiser(model.eval().requires_grad_(False))


class Watching:
    """A validation that notes what the averaged student answers, and finds the first the best."""

    def __init__(self) -> None:
        self.answers: dict[int, list[float]] = {}

    def __call__(self, step: int, student: UNetDenoiser) -> None:
        self.answers[step] = output_of(student, new_inputs(2, 8)).flatten().tolist()

    def best(self, step: int) -> int | None:
        return BEST if step >= BEST else None


def watched(folder: Path, name: str, **loop: Any) -> None:
    """Six steps, validated at the third and the sixth, ending with the averages of the third."""
    watching = Watching() if is_main() else None
    settings = settings_of(max_steps=6, keep_checkpoints=1, checkpoint_every=1, **loop).model_copy(
        update={"validation": ValidationSettings(every=3), "keep": "best"}
    )
    student = train(folder, name, settings=settings, validation=watching)
    if watching is not None:
        seen = {step: watching.answers[step] for step in SEEN_AT}
        end = output_of(student, new_inputs(2, 8)).flatten().tolist()
        (folder / name / "watched.json").write_text(json.dumps([*seen.values(), end]))


def settings_of(**loop: Any) -> DistillSettings:
    values = {"max_steps": STEPS, "batch_size": 4, "warmup_steps": 5, "precision": "fp32", "log_every": 1}
    heads = DiscriminatorSettings(warmup_steps=2, ramp_steps=4)
    return DistillSettings(loop=LoopSettings(**values | {"checkpoint_every": KEPT_AT} | loop), discriminator=heads)


def train(
    folder: Path,
    name: str,
    resumed_from: str | None = None,
    settings: DistillSettings | None = None,
    validation: Any = None,
    **loop: Any,
) -> UNetDenoiser:
    """Distil as `folder/<name>`: history, checkpoints, and what the student answers in the end."""
    if resumed_from is not None and is_main():
        kept = f"step-{KEPT_AT:08d}"
        shutil.copytree(folder / resumed_from / "checkpoints" / kept, folder / name / "checkpoints" / kept)
    if distributed.is_initialized():
        distributed.barrier()
    teacher = new_teacher()
    student = teacher.without(REMOVED)
    student_class = type(student.model)
    history = History(folder / name / "history.jsonl")
    distill(
        teacher,
        student,
        teacher.surviving(REMOVED),
        VPrediction(),
        LatentCache(folder / "latents", "test"),
        settings or settings_of(**loop),
        torch.device("cpu"),
        checkpoints=folder / name / "checkpoints",
        log=history.log,
        validation=validation,
    )
    if is_main():
        assert type(student.model) is student_class
        answer = output_of(student, new_inputs(2, 8)).flatten().tolist()
        (folder / name / "answer.json").write_text(json.dumps(answer))
    return student


def work(rank: int, folder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for parallel in TOGETHER:
        train(folder, parallel, parallel=parallel)
        train(folder, f"one-then-{parallel}", "one", parallel=parallel)
        watched(folder, f"{parallel}-watched", parallel=parallel)
    with pytest.raises(ValueError, match=r"loop\.batch_size") as refused:
        train(folder, "refused", accumulate=4)
    with pytest.raises(NonFiniteLoss) as stopped:
        train(folder / "spoilt", "stopped")
    (folder / f"errors-{rank}.json").write_text(json.dumps([str(refused.value), str(stopped.value)]))
    distributed.destroy_process_group()


def spoil(shard: Path, clip: int) -> None:
    tensors = load_file(shard)
    tensors["latents"][clip] = torch.nan
    save_file(tensors, shard)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training in one process, in micro-batches, in two processes, and changed over at step 14."""
    folder = tmp_path_factory.mktemp("distributed")
    for name in ("", "spoilt"):
        write_latents(folder / name / "latents", 8, size=8)
    spoil(folder / "spoilt" / "latents" / "test-00000.safetensors", clip=SPOILT)
    train(folder, "one")
    train(folder, "accumulated", accumulate=2)
    watched(folder, "one-watched")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    for parallel in TOGETHER:
        train(folder, f"{parallel}-then-one", parallel)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, float]]:
    return History(folder / name / "history.jsonl").rows()


@pytest.mark.parametrize("name", ["accumulated", *TOGETHER])
def test_the_loss_curve_is_that_of_one_process(folder: Path, name: str) -> None:
    assert len(rows(folder, name)) == STEPS
    for row, expected in zip(rows(folder, name), rows(folder, "one"), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("parallel", TOGETHER)
@pytest.mark.parametrize("pattern", ["one-then-{}", "{}-then-one"])
def test_a_checkpoint_does_not_say_how_many_processes_wrote_it(folder: Path, parallel: str, pattern: str) -> None:
    resumed = rows(folder, pattern.format(parallel))
    assert [row["step"] for row in resumed] == list(range(KEPT_AT, STEPS))
    for row, expected in zip(resumed, rows(folder, "one")[KEPT_AT:], strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["accumulated", *TOGETHER, "one-then-fsdp2"])
def test_the_main_process_ends_with_the_whole_averaged_student(folder: Path, name: str) -> None:
    answer, expected = (json.loads((folder / run / "answer.json").read_text()) for run in (name, "one"))
    assert answer == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("parallel", TOGETHER)
def test_a_validation_sees_the_whole_averages_and_the_best_are_kept(folder: Path, parallel: str) -> None:
    found, expected = (
        json.loads((folder / f"{name}-watched" / "watched.json").read_text()) for name in (parallel, "one")
    )
    for answer, other in zip(found, expected, strict=True):
        assert answer == pytest.approx(other, abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-6)
    assert found[2] != pytest.approx(found[1], abs=1e-3)
    kept = sorted(path.name for path in (folder / f"{parallel}-watched" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000003", "step-00000006"]


def test_every_process_says_what_is_wrong_and_where(folder: Path) -> None:
    first, second = (json.loads((folder / f"errors-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    refused, stopped = first
    assert "loop.batch_size is 4" in refused
    assert "loop.accumulate x processes = 4 x 2" in refused
    found = re.search(r"the loss of student is nan at step (0|1), batch \[(\d), (\d)\]", stopped)
    assert found is not None
    assert str(SPOILT) in found.groups()[1:]
