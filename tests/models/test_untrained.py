"""Random weights for timing: of every class, in bfloat16, finite, and where the loaded model has them in float32."""

import pytest
import torch

from tests.models.tiny_transformers import CONFIGS, new_transformer
from tests.models.tiny_unets import CLASSES, new_unet_of
from vdmini_core.models import Denoiser
from vdmini_core.models.untrained import random_inputs, untrained

CPU = torch.device("cpu")


def blank(name: str) -> Denoiser:
    return (new_transformer(name) if name in CONFIGS else new_unet_of(name)).on_meta()


@pytest.mark.parametrize("name", [*CONFIGS, *CLASSES])
@torch.no_grad()
def test_random_bfloat16_weights_answer_finite_numbers_of_ordinary_size(name: str) -> None:
    denoiser = untrained(blank(name), CPU, torch.bfloat16)
    latents, condition = random_inputs(denoiser, (4, 2, 16, 16), CPU, torch.bfloat16)
    answer = denoiser(latents, torch.ones(1), condition)
    assert answer.shape == latents.shape
    assert answer.isfinite().all()
    assert 0.01 < answer.float().std() < 100
    floats = {name: p.dtype for name, p in denoiser.model.named_parameters() if p.dtype != torch.bfloat16}
    kept = set(denoiser.model._keep_in_fp32_modules or ())
    assert all(dtype == torch.float32 and kept & set(name.split(".")) for name, dtype in floats.items())
    assert bool(floats) == bool(kept)


def test_the_seed_decides_the_weights() -> None:
    first, same, other = (
        untrained(blank(CLASSES[0]), CPU, torch.float32, seed).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
