"""The noise algebra: closed forms, and diffusers' own schedulers and pipeline as the reference."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
)
from torch import Tensor

from tests.tiny import FRAMES, LATENT_SIZE
from vdmini_core.diffusion.process import EpsilonPrediction, FlowMatching, Process, VPrediction, like
from vdmini_core.models import SVD
from vdmini_core.models.generating import generate_clip
from vdmini_core.settings import EncodeSettings

ALPHAS = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
PROCESSES = [VPrediction(), EpsilonPrediction(ALPHAS), FlowMatching()]
SIGMA = EpsilonPrediction(ALPHAS).sigmas[torch.tensor([1, 50, 300, 700, 999])].double()
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each_process
def test_the_shares_have_the_ratio_sigma(process: Process) -> None:
    a, b = process.shares(SIGMA)
    torch.testing.assert_close(b / a, SIGMA)


def test_the_shares_keep_the_variance_or_the_sum() -> None:
    for process in PROCESSES[:2]:
        a, b = process.shares(SIGMA)
        torch.testing.assert_close(a**2 + b**2, torch.ones_like(a))
    assert [share.tolist() for share in FlowMatching().shares(torch.tensor([1.0, torch.inf]))] == [
        [0.5, 0.0],
        [0.5, 1.0],
    ]


def test_what_the_network_is_told_of_the_level() -> None:
    one = torch.tensor([1.0])
    assert VPrediction().time(one).item() == 0
    assert VPrediction().time(one * torch.e**4).item() == pytest.approx(1)
    assert FlowMatching().time(one).item() == 500
    epsilon = EpsilonPrediction(ALPHAS)
    assert epsilon.time(epsilon.sigmas[torch.tensor([0, 17, 999])]).tolist() == [0, 17, 999]


@each_process
def test_the_true_answer_gives_clip_and_noise_back(process: Process) -> None:
    x0, noise = drawn(len(SIGMA), 4, 3, 2, 2), drawn(len(SIGMA), 4, 3, 2, 2, seed=1)
    noisy = process.noised(x0, noise, SIGMA)
    again = process.parts(process.target(x0, noise, SIGMA), noisy, SIGMA)
    torch.testing.assert_close(again[0], x0)
    torch.testing.assert_close(again[1], noise)
    torch.testing.assert_close(process.clean(process.target(x0, noise, SIGMA), noisy, SIGMA), x0)


def test_the_velocity_is_edms_preconditioned_target() -> None:
    # Karras et al. (2022), table 1, with SVD's c_skip and c_out: F = (x0 - c_skip y) / c_out.
    x0, noise = drawn(len(SIGMA), 4), drawn(len(SIGMA), 4, seed=1)
    sigma = like(SIGMA, x0)
    c_skip, c_out = 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5
    expected = (x0 - c_skip * (x0 + sigma * noise)) / c_out
    torch.testing.assert_close(VPrediction().target(x0, noise, SIGMA), expected)


@each_process
def test_a_weighted_error_is_that_of_the_velocity(process: Process) -> None:
    # Of the straight or the circular path that the process follows; only a prediction of noise is none.
    circular = VPrediction() if isinstance(process, EpsilonPrediction) else process
    x0, noise, off = (drawn(len(SIGMA), 4, seed=seed) for seed in range(3))
    x = process.noised(x0, noise, SIGMA)
    parts = process.parts(process.target(x0, noise, SIGMA) + off, x, SIGMA)
    error = circular.target(*parts, SIGMA) - circular.target(x0, noise, SIGMA)
    torch.testing.assert_close(off.square() * like(process.velocity_weight(SIGMA), off), error.square())


@each_process
def test_noise_levels_are_log_normal_and_follow_the_generator(process: Process) -> None:
    draw = process.draw(20_000, 0.2, 1.1, torch.Generator().manual_seed(0))
    assert draw.log().mean().item() == pytest.approx(0.2, abs=0.05)
    assert draw.log().std().item() == pytest.approx(1.1, abs=0.05)
    assert torch.equal(draw, process.draw(20_000, 0.2, 1.1, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("steps", [1, 2, 7])
@each_process
def test_with_a_perfect_network_every_sampler_arrives_at_the_clip(process: Process, steps: int) -> None:
    x0, noise = drawn(2, 4, 3, 2, 2), drawn(2, 4, 3, 2, 2, seed=1)
    table = EpsilonPrediction(ALPHAS).sigmas.double()
    sigmas = torch.cat([table[torch.linspace(999, 100, steps).long()], torch.zeros(1, dtype=torch.float64)])
    told: list[float] = []

    def perfect(x: Tensor, time: Tensor) -> Tensor:
        told.append(time[0].item())
        sigma = sigmas[len(told) - 1].expand(len(x))
        a, b = process.shares(like(sigma, x))
        return process.target(x0, (x - a * x0) / b, sigma)

    start = process.noised(x0, noise, sigmas[:1].expand(2))
    torch.testing.assert_close(process.sample(perfect, start, sigmas), x0)
    assert told == pytest.approx(process.time(sigmas[:-1]).tolist())
    told.clear()
    jumped = process.sample_consistency(perfect, start, sigmas, lambda index: drawn(*x0.shape, seed=index))
    torch.testing.assert_close(jumped, x0)


def test_the_solvers_levels_of_v_are_the_stock_schedulers() -> None:
    karras = {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True}
    stock = EulerDiscreteScheduler(sigma_min=0.02, sigma_max=40.0, timestep_spacing="leading", **karras)
    stock.set_timesteps(20)
    torch.testing.assert_close(VPrediction(0.02, 40.0).solver_levels(20), stock.sigmas[:-1].flip(0), rtol=1e-4, atol=0)


def test_the_solvers_levels_of_flow_matching_divide_time_evenly() -> None:
    _, b = FlowMatching().shares(FlowMatching().solver_levels(4))
    torch.testing.assert_close(b, torch.tensor([0.25, 0.5, 0.75, 1.0]))


@each_process
def test_the_solvers_levels_rise_and_are_as_many_as_its_steps(process: Process) -> None:
    levels = process.solver_levels(300)  # not a divisor of the training steps
    assert len(levels) == 300
    assert levels[0] > 0
    assert bool((levels.diff() > 0).all())


def test_a_folder_says_between_which_levels_its_solver_works(tiny_pipeline: SVD) -> None:
    config = tiny_pipeline.scheduler.config
    levels = tiny_pipeline.process.solver_levels(5)
    assert levels[[0, -1]].tolist() == pytest.approx([config.sigma_min, config.sigma_max], rel=1e-4)


def network(x: Tensor, time: Tensor) -> Tensor:
    """Some smooth function of both."""
    return (x * 1.3 + like(time.to(x), x) / 1000).tanh() + 0.2 * x


def test_epsilon_is_the_stock_ddim() -> None:
    stock = DDIMScheduler.from_config(
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
        | {"set_alpha_to_one": True, "timestep_spacing": "trailing"}
    )
    stock.set_timesteps(5)
    start = drawn(2, 4, 2, 3, 3).float()
    expected = start
    for step in stock.timesteps:
        expected = stock.step(network(expected, step.expand(2)), step, expected).prev_sample
    process = EpsilonPrediction(ALPHAS)
    sigmas = torch.cat([process.sigmas[stock.timesteps], torch.zeros(1)])
    torch.testing.assert_close(process.sample(network, start, sigmas), expected, rtol=1e-4, atol=1e-4)


def test_flow_matching_is_the_stock_euler() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(6)
    start = drawn(2, 4, 2, 3, 3).float()
    expected = start
    for step in stock.timesteps:
        expected = stock.step(network(expected, step.expand(2)), step, expected).prev_sample
    t = stock.sigmas
    torch.testing.assert_close(FlowMatching().sample(network, start, t / (1 - t)), expected, rtol=1e-4, atol=1e-4)


def test_our_sampler_is_the_stock_pipeline(tiny_pipeline_folder: Path, tiny_pipeline: SVD) -> None:
    stock = StableVideoDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    stock.set_progress_bar_config(disable=True)
    size = 4 * LATENT_SIZE
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    # The stock pipeline takes a tensor without CLIP's own resizing, so let it embed our resized one.
    condition = tiny_pipeline.condition(image * 2 - 1, [""], EncodeSettings(), torch.Generator().manual_seed(5))
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
    ours = tiny_pipeline.sample(tiny_pipeline.denoiser, lambda _: noise, condition, 3)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, expected.transpose(1, 2), rtol=0, atol=1e-4)


def test_a_generated_clip_follows_its_seed(tiny_pipeline: SVD) -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1

    def clip(seed: int) -> Tensor:
        return generate_clip(tiny_pipeline, image, "", frames=2, steps=1, seed=seed, told=EncodeSettings())

    assert clip(0).shape == (3, 2, 32, 32)
    assert clip(0).abs().max() <= 1
    assert torch.equal(clip(0), clip(0))
    assert not torch.equal(clip(0), clip(1))
