"""Surgery follows the plan of its own teacher, or refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import PROVENANCE, new_inputs, output_of
from vdmini_core.artifacts import Plan, TeacherManifest
from vdmini_core.models import IllegalPlan, UNetDenoiser, load_denoiser
from vdmini_core.pruning.surgery import prune, save_model

TEACHER = TeacherManifest(
    source="s",
    revision=None,
    pipeline="StableVideoDiffusionPipeline",
    parameters={},
    digests={},
    digest="t",
    blocks=(),
)


def plan_for(denoiser: UNetDenoiser, removed: tuple[str, ...], /, **changes: object) -> Plan:
    values = {
        "method": "manual",
        "removed": removed,
        "kept": tuple(unit.name for unit in denoiser.units if unit.name not in removed),
        "teacher_parameters": 1,
        "student_parameters": 1,
        "teacher_flops": 1,
        "student_flops": 1,
        "report_digest": "r",
        "teacher_digest": "t",
        "provenance": PROVENANCE,
    }
    return Plan(**{**values, **changes})


def test_pruning_returns_what_it_wrote(tiny_unet: UNetDenoiser, tmp_path: Path) -> None:
    student = prune(tiny_unet, TEACHER, plan_for(tiny_unet, ("D.0.1", "U.3.1")), tmp_path, torch.float32)
    with tiny_unet.bypass(("D.0.1", "U.3.1")):
        bypassed = output_of(tiny_unet, new_inputs())
    torch.testing.assert_close(output_of(student, new_inputs()), bypassed, rtol=0, atol=1e-5)
    assert torch.equal(output_of(load_denoiser(tmp_path / "denoiser"), new_inputs()), output_of(student, new_inputs()))


def test_half_precision_is_on_disk_only(tiny_unet: UNetDenoiser, tmp_path: Path) -> None:
    student = prune(tiny_unet, TEACHER, plan_for(tiny_unet, ("M",)), tmp_path, torch.float16)
    (file,) = (tmp_path / "denoiser").glob("*.safetensors")
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    assert {p.dtype for p in tiny_unet.model.parameters()} == {torch.float32}


def test_a_plan_for_another_teacher_is_refused(tiny_unet: UNetDenoiser, tmp_path: Path) -> None:
    plan = plan_for(tiny_unet, ("M",), teacher_digest="another")
    with pytest.raises(IllegalPlan, match=r"made for another teacher .* run stage plan again"):
        prune(tiny_unet, TEACHER, plan, tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        ({"kept": ("D.0.0",)}, r"D\.0\.1, D\.1\.0"),
        ({"removed": ("M", "X")}, "X"),
        ({"removed": ("M", "D.0.0")}, r"D\.0\.0"),
    ],
)
def test_a_plan_that_does_not_account_for_every_unit_once_is_refused(
    tiny_unet: UNetDenoiser, tmp_path: Path, changes: dict[str, object], odd: str
) -> None:
    with pytest.raises(IllegalPlan, match=f"each once: see {odd}"):
        prune(tiny_unet, TEACHER, plan_for(tiny_unet, ("M",), **changes), tmp_path, torch.float32)
    assert not (tmp_path / "denoiser").exists()


def test_saving_over_an_older_network_replaces_all_of_it(tiny_unet: UNetDenoiser, tmp_path: Path) -> None:
    (tmp_path / "denoiser").mkdir()
    (tmp_path / "denoiser" / "stale.safetensors").touch()
    save_model(tiny_unet, tmp_path / "denoiser")
    assert not (tmp_path / "denoiser" / "stale.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["denoiser"]
