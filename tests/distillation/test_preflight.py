"""Memory before a training: what is estimated, what there is, and what a refusal says."""

from pathlib import Path

import pytest
import torch

from tests.tiny import new_model, new_unet, write_latents
from vdmini_core.distillation.memory import Recomputed, distillation_memory
from vdmini_core.distillation.preflight import DoesNotFit, check_fits, group_memory_left, memory_there, needed_memory
from vdmini_core.evaluation.activations import AsOnAccelerator, saved_storages, total_bytes
from vdmini_core.models.published import meta_inputs
from vdmini_core.settings import DistillSettings

REMOVED = ("D.0.1", "U.3.1")
GB = 10**9
PARTS = {"teacher_weights": 2 * GB, "student_weights": GB, "gradients": GB, "activations": 6 * GB}


def settings_of(batch: int = 2, checkpointing: bool = False, **loop: object) -> DistillSettings:
    values = {"max_steps": 1, "batch_size": batch, "precision": "fp32", **loop}
    return DistillSettings.model_validate({"loop": values, "checkpointing": checkpointing})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of which only the U-Net's config is left: weights are not asked for."""
    folder = tmp_path_factory.mktemp("teacher")
    new_model().save_pretrained(folder / "unet")
    for weights in folder.glob("unet/*.safetensors"):
        weights.unlink()
    return folder


def test_the_estimate_is_that_of_the_configs_and_the_cached_latents(teacher: Path, tmp_path: Path) -> None:
    data = write_latents(tmp_path, 2, size=16)
    found = needed_memory(teacher, REMOVED, data, settings_of(batch=6, accumulate=3))
    meta = new_unet().on_meta()
    inputs = meta_inputs(meta, (4, 4, 16, 16), 2)
    student = meta.without(REMOVED)
    assert found == distillation_memory(meta, student, meta.surviving(REMOVED), settings_of(), *inputs)


def test_checkpointing_keeps_what_blocks_are_given_and_the_largest_of_them() -> None:
    def activations(checkpointing: bool, batch: int) -> int:
        teacher = new_unet().on_meta()
        student, inputs = teacher.without(REMOVED), meta_inputs(teacher, (4, 4, 16, 16), batch)
        settings = settings_of(batch, checkpointing)
        return distillation_memory(teacher, student, teacher.surviving(REMOVED), settings, *inputs)["activations"]

    assert activations(True, 4) < 0.8 * activations(False, 4)
    # Every part of it is a feature or an input of some clip: twice the clips, nearly twice the bytes.
    assert activations(True, 8) == pytest.approx(2 * activations(True, 4), rel=0.1)


def test_a_block_that_is_run_again_counts_as_it_does_without_checkpointing() -> None:
    denoiser = new_unet().on_meta()
    denoiser.model.train().requires_grad_(True)
    latents, condition = meta_inputs(denoiser, (4, 4, 16, 16), 1)
    recomputed = Recomputed()
    denoiser.model.enable_gradient_checkpointing(recomputed)
    weights = list(denoiser.model.parameters())
    with AsOnAccelerator(autocast=False):
        outside = saved_storages(lambda: denoiser(latents, torch.ones(1, device="meta"), condition), weights)
        denoiser.model.disable_gradient_checkpointing()
        everything = saved_storages(lambda: denoiser(latents, torch.ones(1, device="meta"), condition), weights)
    assert 0 < recomputed.largest < total_bytes(everything)
    assert total_bytes(outside | recomputed.kept) < total_bytes(everything)


def test_what_fits_is_let_through_and_what_does_not_is_refused_with_its_parts() -> None:
    check_fits(PARTS, 10 * GB, "a device", settings_of())
    with pytest.raises(DoesNotFit) as refused:
        check_fits(PARTS, 9 * GB, "a device", settings_of(accumulate=1))
    text = str(refused.value)
    assert "needs about 10 GB of memory (teacher weights 2, student weights 1, gradients 1, activations 6)" in text
    assert "a device has 9 GB" in text
    assert "raise distill.loop.accumulate (1) or lower distill.loop.batch_size (2)" in text
    assert "set distill.checkpointing to true" in text
    assert "set distill.loop.precision to bf16" in text
    assert "distill.memory_check: false" in text


def test_a_refusal_suggests_nothing_that_is_already_so() -> None:
    with pytest.raises(DoesNotFit) as refused:
        check_fits(PARTS, 9 * GB, "a device", settings_of(checkpointing=True, precision="bf16"))
    assert "distill.checkpointing" not in str(refused.value)
    assert "precision" not in str(refused.value)


def test_where_the_weights_alone_are_too_much_a_smaller_batch_is_not_suggested() -> None:
    with pytest.raises(
        DoesNotFit, match=r"need 4 GB alone: take a larger device, or share them out .* fsdp2"
    ) as refused:
        check_fits(PARTS, 3 * GB, "a device", settings_of())
    assert "batch_size" not in str(refused.value)


def test_this_machine_has_some_memory() -> None:
    assert 10**8 < memory_there(torch.device("cpu")) < 10**15


def test_the_limit_of_a_control_group_counts_without_cached_files(tmp_path: Path) -> None:
    assert group_memory_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert group_memory_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert group_memory_left(tmp_path) == 1000 - (700 - 150)


def test_the_first_version_of_control_groups_is_read_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000\n")
    (folder / "memory.usage_in_bytes").write_text("400\n")
    (folder / "memory.stat").write_text("total_inactive_file 100\n")
    assert group_memory_left(tmp_path) == 700
