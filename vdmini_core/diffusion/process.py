"""The noise algebra of every teacher behind one interface: v (EDM), epsilon (DDPM, LCM), flow matching.

The level of noise is always the noise-to-signal ratio sigma, [B]. A network sees x = a x0 + b noise,
with x0 the clean latents, noise standard normal and b / a = sigma:

| process | a | b | time | answer |
|---|---|---|---|---|
| v (EDM, SVD) | 1 / sqrt(1 + sigma^2) | a sigma | ln(sigma) / 4 | a noise - b x0 |
| epsilon (DDPM, LCM) | 1 / sqrt(1 + sigma^2) | a sigma | the training step whose sigma this is | noise |
| flow matching | 1 / (1 + sigma) | 1 - a | 1000 b | noise - x0 |

EDM: Karras et al., arXiv 2206.00364; SVD: arXiv 2311.15127, appendix D; LCM: arXiv 2310.04378; flow
matching in this form: arXiv 2403.03206.

Training levels are log-normal: EDM's choice, and for flow matching the logit-normal t of Stable Diffusion 3
with the same mean and deviation, because logit(t) = ln(sigma).
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]
"""F(x [B, ...], time [B]) -> answer [B, ...]."""


def like(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [B] with trailing ones, to multiply x [B, ...]."""
    return sigma.reshape(-1, *([1] * (x.ndim - 1)))


class Process(ABC):
    """How latents are noised for a network, what it is told and what its answer means; sigma is [B]."""

    def facts(self) -> dict[str, object]:
        """Which algebra this is, with its constants; plain values."""
        constants = {name: torch.as_tensor(value).tolist() for name, value in vars(self).items()}
        return {"class": type(self).__name__, **constants}

    def draw(self, batch: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
        """Training levels: ln(sigma) is normal with this mean and deviation."""
        return (mean + std * torch.randn(batch, generator=generator)).exp()

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network sees: a x0 + b noise."""
        a, b = self.shares(like(sigma, x0))
        return a * x0 + b * noise

    @abstractmethod
    def shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a and b, the shares of signal and noise; finite for an infinite sigma."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """What the network is told of the level."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the network should answer."""

    @abstractmethod
    def parts(self, answer: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and noise that an answer to x means."""

    @abstractmethod
    def solver_levels(self, steps: int) -> Tensor:
        """sigma [steps] of an ODE solver's steps on the CPU, rising, without the clean end."""

    def velocity_weight(self, sigma: Tensor) -> Tensor:
        """What makes an answer's squared error that of a velocity, [B]: 1 where the answer is one."""
        return torch.ones_like(sigma)

    def clean(self, answer: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The x0 that an answer to x means."""
        return self.parts(answer, x, sigma)[0]

    def sample(self, network: Network, start: Tensor, sigmas: Tensor) -> Tensor:
        """Euler steps of the probability-flow ODE over falling `sigmas` [steps + 1], from x = `start`.

        Every step goes to a' x0 + b' noise, which is `EulerDiscreteScheduler` for v, DDIM for epsilon and
        `FlowMatchEulerDiscreteScheduler` for flow matching.
        """
        return self._sample(network, start, sigmas, lambda index, found: found)

    def sample_consistency(
        self, network: Network, start: Tensor, sigmas: Tensor, fresh: Callable[[int], Tensor]
    ) -> Tensor:
        """Jump to x0 and re-noise with `fresh(1)`, `fresh(2)` ..., level by level (LCM)."""
        return self._sample(network, start, sigmas, lambda index, found: fresh(index).to(found))

    def _sample(
        self, network: Network, start: Tensor, sigmas: Tensor, next_noise: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        x = start
        for index, (sigma, following) in enumerate(itertools.pairwise(sigmas.to(x)), 1):
            level = sigma.expand(len(x))
            x0, found = self.parts(network(x, self.time(level)), x, level)
            x = self.noised(x0, next_noise(index, found), following.expand(len(x))) if following > 0 else x0
        return x


class VPrediction(Process):
    """EDM's log-normal levels with the v-prediction of SVD, where sigma_data = 1.

    A solver's levels lie between `sigma_min` and `sigma_max`, by default SVD's.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 700.0) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a = (sigma**2 + 1) ** -0.5
        return a, a * sigma

    def time(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        a, b = self.shares(like(sigma, x0))
        return a * noise - b * x0

    def parts(self, answer: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.shares(like(sigma, x))
        return a * x - b * answer, b * x + a * answer

    def solver_levels(self, steps: int) -> Tensor:
        """Evenly spaced in sigma^(1/7) (EDM, equation 5)."""
        ends = self.sigma_min ** (1 / 7), self.sigma_max ** (1 / 7)
        return torch.linspace(*ends, steps, device="cpu") ** 7


class EpsilonPrediction(Process):
    """A discrete variance-preserving process; `alphas_cumprod` [N] are its training steps' squared signal shares."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()

    def draw(self, batch: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
        """Log-normal, rounded to the nearest training step."""
        return self.sigmas[self.time(super().draw(batch, mean, std, generator))]

    def shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a = (sigma**2 + 1) ** -0.5
        return a, a * sigma

    def time(self, sigma: Tensor) -> Tensor:
        """The training step with the nearest ln(sigma), an integer."""
        steps = self.sigmas.to(sigma.device).log()
        return (steps[None] - sigma[:, None].log()).abs().argmin(1)

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def velocity_weight(self, sigma: Tensor) -> Tensor:
        """1 / a^2: with x0 = (x - b noise) / a, v = a noise - b x0 is (noise - b x) / a, whose last term is known.

        Unweighted, an x0 that is wrong by 1 costs sigma^-2, so that what high noise decides is learned last.
        """
        return 1 + sigma**2

    def parts(self, answer: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.shares(like(sigma, x))
        return (x - b * answer) / a, answer

    def solver_levels(self, steps: int) -> Tensor:
        """Those of evenly spaced training steps, up to the last, that `LCMScheduler` samples from."""
        skip = len(self.sigmas) // steps
        if skip == 0:
            raise ValueError(f"a solver of {steps} steps; the process has {len(self.sigmas)}: take as many or fewer")
        return self.sigmas[skip - 1 :: skip][:steps]


class FlowMatching(Process):
    """Rectified flow: a straight line from clean latents to noise, whose velocity the network answers."""

    def shares(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a = 1 / (1 + sigma)
        return a, 1 - a

    def time(self, sigma: Tensor) -> Tensor:
        return 1000 * self.shares(sigma)[1]

    def target(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0

    def parts(self, answer: Tensor, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.shares(like(sigma, x))
        return x - b * answer, x + a * answer

    def solver_levels(self, steps: int) -> Tensor:
        """Evenly spaced in time; the last, pure noise, is infinite."""
        share = torch.arange(1, steps + 1, device="cpu") / steps
        return share / (1 - share)
