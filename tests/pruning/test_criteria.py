"""Criteria against independent computations, on a small U-Net and a small transformer."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from tests.models.tiny_transformers import new_condition, new_latents, new_transformer
from tests.tiny import EVEN, new_inputs, new_unet
from vdmini_core.models import Denoiser
from vdmini_core.models.shared_start import Cut, find_cuts
from vdmini_core.pruning.calibration import Calibration, CalibrationBatch
from vdmini_core.pruning.criteria import CRITERIA, block_influence, magnitude, output_mse, random, taylor

Setting = tuple[Denoiser, Calibration, dict[str, Cut]]


def setting_of(denoiser: Denoiser, latents: Tensor, condition: dict[str, Tensor], time: float) -> Setting:
    """Two batches of one clip each."""
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    batches = tuple(
        CalibrationBatch(
            latents[i : i + 1],
            torch.full((1,), time),
            target[i : i + 1],
            torch.tensor([1.0 + i]),
            {key: value[i : i + 1] for key, value in condition.items()},
        )
        for i in range(2)
    )
    cuts = find_cuts(denoiser, [(u.name,) for u in denoiser.units], batches[0].noisy, batches[0].condition)
    return denoiser, batches, {name: cut for (name,), cut in cuts.items()}


@pytest.fixture(scope="module")
def unet() -> Setting:
    return setting_of(new_unet(EVEN), *new_inputs(2), 0.3)


@pytest.fixture(scope="module")
def transformer() -> Setting:
    denoiser = new_transformer("HunyuanVideoTransformer3DModel")
    return setting_of(denoiser, new_latents(2), new_condition(2), 300.0)


def loss_of(denoiser: Denoiser, calibration: Iterable[CalibrationBatch]) -> Tensor:
    """Mean over clips of the weighted squared error."""
    errors = [(batch.answer(denoiser) - batch.target).square().mean() * batch.weight for batch in calibration]
    return torch.cat(errors).mean()


@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_criterion_scores_every_unit_and_leaves_the_network_as_it_was(name: str, transformer: Setting) -> None:
    denoiser, calibration, cuts = transformer
    before = {key: value.clone() for key, value in denoiser.model.state_dict().items()}
    found = CRITERIA[name](denoiser, calibration, cuts, 0)
    assert list(found) == [unit.name for unit in denoiser.units]
    assert all(torch.isfinite(torch.tensor(score)) and score >= 0 for score in found.values())
    assert len(set(found.values())) > 1
    assert CRITERIA[name](denoiser, calibration, cuts, 0) == pytest.approx(found)
    assert not any(p.requires_grad or p.grad is not None for p in denoiser.model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in denoiser.model.state_dict().items())


def test_magnitude_is_the_sum_of_absolute_weights(unet: Setting) -> None:
    denoiser = unet[0]
    block = denoiser.model.up_blocks[3]
    parts = [*block.resnets[1].parameters(), *block.attentions[1].parameters()]
    assert magnitude(*unet, 0)["U.3.1"] == pytest.approx(float(torch.cat([p.flatten() for p in parts]).abs().sum()))


def test_taylor_is_weight_times_gradient_of_the_mean_loss(transformer: Setting) -> None:
    denoiser, calibration, _ = transformer
    scores = taylor(*transformer, 0)
    unit = denoiser.units[1]
    weights = list(denoiser.model.get_submodule(unit.modules[0]).parameters())
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(loss_of(denoiser, calibration), weights, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    pairs = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
    assert scores[unit.name] == pytest.approx(sum(float((w * g).abs().sum()) for w, g in pairs), rel=1e-4)


@torch.no_grad()
def test_output_mse_is_the_weighted_change_of_the_answer(unet: Setting) -> None:
    denoiser, calibration, _ = unet
    found = output_mse(*unet, 0)
    for name in ("D.0.1", "M"):
        changes = []
        for batch in calibration:
            intact = batch.answer(denoiser)
            with denoiser.bypass([name]):
                changes.append((batch.answer(denoiser) - intact).square().mean() * batch.weight)
        assert found[name] == pytest.approx(float(torch.cat(changes).mean()), rel=1e-4)


@torch.no_grad()
def test_block_influence_is_how_far_a_unit_turns_its_tokens(transformer: Setting) -> None:
    denoiser, calibration, _ = transformer
    unit = denoiser.units[0]
    turns: list[Tensor] = []

    def see(module: object, args: tuple[Tensor, ...], named: dict[str, Tensor], answer: tuple[Tensor, ...]) -> None:
        before = (args or tuple(named.values()))[0]
        turns.append(1 - torch.nn.functional.cosine_similarity(before, answer[0], dim=-1).mean())

    handle = denoiser.model.get_submodule(unit.modules[0]).register_forward_hook(see, with_kwargs=True)
    for batch in calibration:
        batch.answer(denoiser)
    handle.remove()
    assert block_influence(*transformer, 0)[unit.name] == pytest.approx(float(torch.stack(turns).mean()), rel=1e-4)


def test_another_seed_is_another_random_order(unet: Setting) -> None:
    assert random(*unet, 0) == random(*unet, 0) != random(*unet, 1)
