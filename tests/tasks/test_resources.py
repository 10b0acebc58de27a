"""Memory and disk that run out: one paragraph that names the stage, the place and the settings to change."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from tasks._stage import Context, resources_explained
from tasks.distill import MANNER
from vdmini_core.settings import DistillSettings, EncodeSettings, LoopSettings, Params

PARAMS = Params(distill=DistillSettings(loop=LoopSettings(max_steps=6, batch_size=2)), encode=EncodeSettings())


def explained(stage: str, error: Exception) -> BaseException:
    """What a stage that ends with `error` tells its user."""
    context = Context(stage, PARAMS, SimpleNamespace(), torch.device("cpu"))
    try:
        with resources_explained(context):
            raise error
    except Exception as told:
        return told


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"
        ),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        MemoryError("Unable to allocate 7.11 PiB"),
    ],
)
def test_out_of_memory_names_the_batch_and_the_size_of_a_clip(error: Exception) -> None:
    text = str(explained("distill", error))
    assert "stage distill is out of memory" in text
    assert str(error)[:20] in text
    named = ("distill.loop.batch_size (2)", "distill.validation.batch_size (8)", "data.frames (8)", "data.size (64)")
    assert "lower " + " or ".join(named) in text
    assert text.endswith("distill.loop.accumulate above 1 and distill.checkpointing need less, and go on where it was")


def test_a_real_allocation_that_cannot_succeed_is_recognised() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    assert isinstance(explained("encode", refused.value), MemoryError)


def test_a_stage_without_such_settings_names_none_of_its_own() -> None:
    text = str(explained("plan", MemoryError("no more")))
    assert text.endswith("Give it more, or lower data.frames (8) or data.size (64)")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "artifacts/distill/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_names_the_folder_and_the_settings(error: Exception) -> None:
    told = explained("distill", error)
    assert isinstance(told, OSError)
    assert told.errno == errno.ENOSPC
    assert f"the disk of {Path.cwd()} is full" in str(told)
    assert "lower distill.loop.keep_checkpoints (2) or distill.teacher_draws (0)" in str(told)
    assert "the same command goes on" in str(told)


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError("y"), RuntimeError("z")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert explained("distill", error) is error


def test_what_a_full_disk_asks_to_change_does_not_start_the_training_anew() -> None:
    def kept(**changes: int) -> dict[str, object]:
        loop = LoopSettings(max_steps=6, batch_size=2, **changes)
        return DistillSettings(loop=loop).model_dump(mode="json", exclude=MANNER)

    assert kept(checkpoint_every=7, keep_checkpoints=1, log_every=3) == kept()
    assert kept(warmup_steps=7) != kept()
