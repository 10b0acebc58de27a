"""The terms of the objective on tensors small enough to work out by hand."""

import pytest
import torch

from vdmini_core.distillation.losses import (
    denoising_loss,
    discriminator_hinge_loss,
    generator_hinge_loss,
    individual_content_loss,
)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_the_task_loss_is_the_mean_square_with_a_weight_a_clip() -> None:
    answer, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [3.0, 1.0]])
    assert denoising_loss(answer, target, t(1.0, 1.0)).item() == 3.75
    assert denoising_loss(answer, target, t(2.0, 0.1)).item() == 2.75


def test_the_content_loss_sums_the_mean_squares_of_the_taps() -> None:
    # (1 + 9) / 2 + (4 + 0) / 2
    assert individual_content_loss([t(1.0, 3.0), t(2.0, 5.0)], [t(0.0, 0.0), t(0.0, 5.0)]).item() == 7.0


def test_the_normalised_content_loss_does_not_know_a_taps_scale() -> None:
    student, teacher = t(1.0, 2.0, 4.0), t(0.0, 2.0, 4.0)  # (1 / 3) / variance 4
    assert individual_content_loss([student], [teacher], normalised=True).item() == pytest.approx(1 / 12)
    scaled = individual_content_loss([student, 1000 * student], [teacher, 1000 * teacher], normalised=True)
    assert scaled.item() == pytest.approx(1 / 6)


def test_the_content_loss_is_taken_in_float32() -> None:
    student, teacher = t(300.0).half(), t(0.0).half()
    assert individual_content_loss([student], [teacher]).item() == 90_000.0


def test_unmatched_taps_are_refused() -> None:
    with pytest.raises(ValueError, match="2 student taps against 1 teacher taps"):
        individual_content_loss([t(1.0), t(1.0)], [t(1.0)])
    with pytest.raises(ValueError, match="0 student taps against 0 teacher taps"):
        individual_content_loss([], [])


def test_the_content_loss_sends_no_gradient_to_the_teacher() -> None:
    student, teacher = t(1.0).requires_grad_(), t(3.0).requires_grad_()
    individual_content_loss([student], [teacher]).backward()
    assert student.grad.item() == -4.0
    assert teacher.grad is None


def test_the_discriminators_hinge_has_its_closed_form() -> None:
    # One head: fakes relu(1 + .) = 0, 1.5, 3 -> 1.5; reals relu(1 - .) = 0, 0.5, 3 -> 7 / 6.
    loss = discriminator_hinge_loss([t(-2.0, 0.5, 2.0)], [t(2.0, 0.5, -2.0)])
    assert loss.item() == pytest.approx(1.5 + 3.5 / 3)


def test_the_hinge_is_two_at_chance_and_zero_when_won() -> None:
    assert discriminator_hinge_loss([t(0.0), t(0.0)], [t(0.0), t(0.0)]).item() == 2.0
    assert discriminator_hinge_loss([t(-1.0)], [t(1.0)]).item() == 0.0


def test_heads_of_different_sizes_count_alike() -> None:
    loss = discriminator_hinge_loss([t(1.0), t(*[-1.0] * 9)], [t(1.0), t(*[1.0] * 9)])
    assert loss.item() == 1.0
    assert generator_hinge_loss([t(1.0), t(*[-2.0] * 9)]).item() == 0.5


def test_the_students_hinge_falls_as_the_logits_rise() -> None:
    logits = t(0.5, 1.5).requires_grad_()
    loss = generator_hinge_loss([logits])
    loss.backward()
    assert loss.item() == -1.0
    assert logits.grad.tolist() == [-0.5, -0.5]


def test_every_head_must_have_its_counterpart() -> None:
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        discriminator_hinge_loss([t(0.0), t(0.0)], [t(0.0)])
