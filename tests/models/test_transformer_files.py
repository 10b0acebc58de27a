"""Pruned video transformers on disk: stock checkpoints, which load again as they were."""

from pathlib import Path

import pytest
import torch

from tests.models import fresh
from tests.models.test_transformer import REMOVED, TEACHERS, TIME, WAN, assert_same, every_class
from tests.models.tiny_transformers import answer_of, new_condition, new_latents
from vdmini_core.models.loading import UnusableModel
from vdmini_core.models.transformer import TRANSFORMERS, load_transformer


@pytest.fixture(scope="module")
def saved_students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per class: a student, and a call of it with what it answered."""
    root = tmp_path_factory.mktemp("students")
    for name, teacher in TEACHERS.items():
        student = teacher.without(REMOVED[name])
        student.model.save_pretrained(root / name)
        arguments = student.arguments(new_latents(), TIME, new_condition())
        with torch.no_grad():
            answer = student.model(**arguments, return_dict=False)[0]
        keywords = {**arguments, "return_dict": False}
        torch.save({"args": (), "keywords": keywords, "answer": answer}, root / name / "call.pt")
    return root


def test_stock_diffusers_alone_reloads_every_student_in_a_fresh_process(saved_students: Path) -> None:
    results = fresh.stock_answers(saved_students)
    assert sorted(results) == sorted(TRANSFORMERS)
    for name, (cls, wrong, worst) in results.items():
        assert cls == name
        assert wrong == [], name
        assert worst < 1e-5, name


@every_class
def test_a_saved_student_loads_as_a_denoiser(saved_students: Path, name: str) -> None:
    again = load_transformer(saved_students / name)
    assert_same(answer_of(again), answer_of(TEACHERS[name].without(REMOVED[name])))
    assert not again.model.training
    assert not any(parameter.requires_grad for parameter in again.model.parameters())


@every_class
def test_a_half_precision_teacher_has_a_student_of_the_same_dtypes(saved_students: Path, name: str) -> None:
    teacher = load_transformer(saved_students / name, dtype=torch.bfloat16)
    student = teacher.without(())
    kept = {key: tensor.dtype for key, tensor in teacher.model.state_dict().items()}
    assert torch.bfloat16 in kept.values()
    assert {key: tensor.dtype for key, tensor in student.model.state_dict().items()} == kept
    condition = {
        key: told.bfloat16() if key.startswith(("text", "pooled")) else told for key, told in new_condition().items()
    }
    with torch.no_grad():
        answers = [denoiser(new_latents().bfloat16(), TIME, condition) for denoiser in (teacher, student)]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"_class_name": "AllegroTransformer3DModel"}', "names the class 'AllegroTransformer3DModel'"),
        ("{}", "no config"),
    ],
)
def test_a_folder_of_another_class_is_refused_by_name(
    saved_students: Path, tmp_path: Path, content: str, reason: str
) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).write_bytes((saved_students / WAN / weights).read_bytes())
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnusableModel, match=reason):
        load_transformer(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableModel, match="does not exist"):
        load_transformer(tmp_path / "absent")
