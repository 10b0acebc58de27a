"""The noise algebra: closed forms, and diffusers' own pipeline as the reference."""

from pathlib import Path

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from torch import Tensor

from tests.tiny import FRAMES, LATENT_SIZE
from vdmini_core.diffusion import edm
from vdmini_core.models import SVD
from vdmini_core.models.generating import generate_clip

SIGMA = torch.tensor([0.002, 0.5, 1.0, 7.0, 700.0], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_coefficients_have_their_closed_forms_at_sigma_one() -> None:
    one = torch.tensor([1.0], dtype=torch.float64)
    root = 0.5**0.5
    assert edm.c_in(one).item() == pytest.approx(root)
    assert edm.c_skip(one).item() == pytest.approx(0.5)
    assert edm.c_out(one).item() == pytest.approx(-root)
    assert edm.c_noise(one).item() == 0


def test_skip_and_output_weights_keep_the_target_at_unit_variance() -> None:
    # Karras et al. (2022), eqs. 115 to 138, with sigma_data = 1.
    torch.testing.assert_close(edm.c_skip(SIGMA) ** 2 * SIGMA**2 + (1 - edm.c_skip(SIGMA)) ** 2, edm.c_out(SIGMA) ** 2)
    torch.testing.assert_close(edm.c_skip(SIGMA) + edm.c_out(SIGMA) ** 2, torch.ones_like(SIGMA))
    torch.testing.assert_close(edm.c_in(SIGMA) ** 2, edm.c_skip(SIGMA))


def test_denoising_with_the_true_velocity_gives_the_clip_back() -> None:
    x0 = drawn(len(SIGMA), 4, 3, 2, 2)
    noisy = x0 + edm.like(SIGMA, x0) * drawn(len(SIGMA), 4, 3, 2, 2, seed=1)
    again = edm.denoised(edm.velocity(x0, noisy, SIGMA), noisy, SIGMA)
    torch.testing.assert_close(again, x0)


def test_the_velocity_is_the_variance_preserving_one() -> None:
    # v = a * noise - s * x0 with a = c_in, s = sigma * c_in (Salimans and Ho 2022).
    x0, noise = drawn(len(SIGMA), 4), drawn(len(SIGMA), 4, seed=1)
    sigma = edm.like(SIGMA, x0)
    expected = edm.c_in(sigma) * (noise - sigma * x0)
    torch.testing.assert_close(edm.velocity(x0, x0 + sigma * noise, SIGMA), expected)


def test_noise_levels_are_log_normal_and_follow_the_generator() -> None:
    draw = edm.draw_sigma(20_000, 0.7, 1.6, torch.Generator().manual_seed(0))
    assert draw.log().mean().item() == pytest.approx(0.7, abs=0.05)
    assert draw.log().std().item() == pytest.approx(1.6, abs=0.05)
    assert torch.equal(draw, edm.draw_sigma(20_000, 0.7, 1.6, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_with_a_perfect_denoiser_arrives_at_the_clip(steps: int) -> None:
    x0, noise = drawn(2, 4, 3, 2, 2), drawn(2, 4, 3, 2, 2, seed=1)
    sigmas = torch.cat([torch.linspace(40, 0.02, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    seen: list[float] = []

    def perfect(scaled: Tensor, c_noise: Tensor) -> Tensor:
        sigma = (4 * c_noise).exp()
        seen.append(sigma[0].item())
        return edm.velocity(x0, scaled / edm.c_in(edm.like(sigma, scaled)), sigma)

    torch.testing.assert_close(edm.sample_euler(perfect, noise, sigmas, 40.0), x0)
    assert seen == pytest.approx(sigmas[:-1].tolist())


def test_our_sampler_is_the_stock_pipeline(tiny_pipeline_folder: Path, tiny_pipeline: SVD) -> None:
    stock = StableVideoDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    stock.set_progress_bar_config(disable=True)
    size = 4 * LATENT_SIZE
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    # The stock pipeline takes a tensor without CLIP's own resizing, so let it embed our resized one.
    condition = tiny_pipeline.condition(
        image * 2 - 1, fps=7, motion_bucket_id=127, noise_augmentation=0.02, generator=torch.Generator().manual_seed(5)
    )
    stock._encode_image = lambda *_: condition["image_embedding"]
    noise = torch.randn(1, 4, FRAMES, LATENT_SIZE, LATENT_SIZE, generator=torch.Generator().manual_seed(4))
    expected = stock(
        image,
        height=size,
        width=size,
        num_frames=FRAMES,
        num_inference_steps=3,
        max_guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        latents=noise.transpose(1, 2),
        output_type="latent",
    ).frames
    ours = tiny_pipeline.sample(tiny_pipeline.denoiser, noise, condition, 3)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=0, atol=1e-4)


def test_a_generated_clip_follows_its_seed(tiny_pipeline: SVD) -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1

    def clip(seed: int) -> Tensor:
        return generate_clip(
            tiny_pipeline, image, frames=2, steps=1, seed=seed, fps=7, motion_bucket_id=127, noise_augmentation=0.02
        )

    assert clip(0).shape == (3, 2, 32, 32)
    assert clip(0).abs().max() <= 1
    assert torch.equal(clip(0), clip(0))
    assert not torch.equal(clip(0), clip(1))
