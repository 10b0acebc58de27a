"""EDM noise algebra with v-prediction preconditioning, as in Stable Video Diffusion; pure functions.

Convention: `x_sigma = x0 + sigma * noise` with sigma in units of the data's standard deviation, and
a network F that sees `c_in * x_sigma` and `c_noise`. Karras et al. 2022 (arXiv 2206.00364), table 1,
with the v-prediction c_skip and c_out of SVD (arXiv 2311.15127, appendix D), where sigma_data = 1.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]
"""F(scaled noisy latents [B, ...], c_noise [B]) -> prediction [B, ...]."""


def like(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [B] with trailing ones, to multiply x [B, ...]."""
    return sigma.reshape(-1, *([1] * (x.ndim - 1)))


def c_in(sigma: Tensor) -> Tensor:
    """Input scale 1 / sqrt(sigma^2 + 1)."""
    return (sigma**2 + 1) ** -0.5


def c_skip(sigma: Tensor) -> Tensor:
    """Weight of the noisy input in the denoised output, 1 / (sigma^2 + 1)."""
    return 1 / (sigma**2 + 1)


def c_out(sigma: Tensor) -> Tensor:
    """Weight of the network's output, -sigma / sqrt(sigma^2 + 1)."""
    return -sigma * (sigma**2 + 1) ** -0.5


def c_noise(sigma: Tensor) -> Tensor:
    """What the network is told of the noise level, ln(sigma) / 4."""
    return 0.25 * sigma.log()


def denoised(network_output: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """x0 estimate: c_skip * x_sigma + c_out * F."""
    return c_skip(like(sigma, noisy)) * noisy + c_out(like(sigma, noisy)) * network_output


def velocity(x0: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """What F should answer for a known x0: (x0 - c_skip * x_sigma) / c_out."""
    sigma = like(sigma, noisy)
    return (x0 - c_skip(sigma) * noisy) / c_out(sigma)


def draw_sigma(batch: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Log-normal training noise levels [B]."""
    return (mean + std * torch.randn(batch, generator=generator)).exp()


def sample_euler(network: Network, noise: Tensor, sigmas: Tensor, initial_scale: float) -> Tensor:
    """Integrate the probability-flow ODE with Euler steps from `initial_scale * noise`.

    `noise` is standard normal [B, ...]; `sigmas` [steps + 1] fall from the highest level to 0. With a
    scheduler's own levels and `init_noise_sigma` this is diffusers' `EulerDiscreteScheduler`.
    """
    x = noise * initial_scale
    for sigma, following in itertools.pairwise(sigmas):
        level = sigma.expand(len(x)).to(x.device)
        output = network(x * c_in(like(level, x)), c_noise(level))
        x0 = denoised(output, x, level)
        x = x + (x - x0) / sigma * (following - sigma)
    return x
