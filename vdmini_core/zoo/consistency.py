"""Distils an epsilon-predicting teacher into a latent consistency model (LCM, Luo et al., arXiv 2310.04378).

Convention: levels are noise-to-signal ratios sigma as in `diffusion.process`; w is the embedded guidance scale,
with w = 0 for no guidance, as in LCM's equation 7: answer = told + w (told - untold).
"""

import copy
from pathlib import Path

import torch
from torch import Tensor

from vdmini_core.diffusion.process import EpsilonPrediction
from vdmini_core.distillation.losses import pseudo_huber_loss as consistency_loss
from vdmini_core.models import Condition, Denoiser
from vdmini_core.models.videocrafter import guidance_embedding
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.distributed import Batch, State
from vdmini_core.training.loop import train
from vdmini_core.training.player import Player
from vdmini_core.zoo.teacher import LatentSet, guided_answer

GUIDANCE = 0.0, 5.0
"""w is drawn uniformly from here; of 1.5, 3 and 5 the base was worst with 5."""


def solver_levels(process: EpsilonPrediction, steps: int) -> Tensor:
    """sigma of the ODE solver's steps, rising, without the clean end; those that `LCMScheduler` samples from."""
    return process.solver_levels(steps)


@torch.no_grad()
def guided_step(
    base: Denoiser,
    process: EpsilonPrediction,
    x: Tensor,
    sigma: Tensor,
    following: Tensor,
    condition: Condition,
    untold: Condition,
    scale: Tensor,
) -> Tensor:
    """DDIM with classifier-free guidance `scale` [B], from x [B, C, T, h, w] at `sigma` [B] to `following` [B]."""
    answer = guided_answer(base, x, process.time(sigma), condition, untold, scale)
    x0, noise = process.parts(answer, x, sigma)
    return process.noised(x0, noise, following)


def distil_consistency(
    base: Denoiser,
    process: EpsilonPrediction,
    levels: Tensor,
    data: LatentSet,
    untold: Condition,
    settings: LoopSettings,
    device: torch.device,
    *,
    learning_rate: float = 3e-4,
    checkpoints: Path | None = None,
    fingerprint: str = "",
    log: Log = silent_log,
    track: Track = silent_track,
) -> Denoiser:
    """A copy of `base` that answers, at one of the solver's `levels`, where its guided ODE ends.

    Its answer at a level should be what the averaged student answers at the next lower one, after one step of
    the base there. At the clean end that is the step's own result: a network's x0 at sigma 0 is its input.
    """
    base.model.to(device).eval().requires_grad_(False)
    student, target = (type(base)(copy.deepcopy(base.model)) for _ in range(2))
    lower = torch.cat([torch.zeros(1), levels[:-1]])

    def batch_of(step: int, generator: torch.Generator) -> Batch:
        batch = data.shuffled(step, settings)
        count = len(batch["chosen"])
        level = torch.randint(len(levels), (count,), generator=generator)
        scale = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(count, generator=generator)
        noise = torch.randn(data.latents[batch["chosen"]].shape, generator=generator)
        return batch | {"level": level, "scale": scale, "noise": noise}

    @torch.no_grad()
    def prepare(batch: Batch, step: int) -> State:
        assert player.ema is not None
        player.ema.copy_to(target.model)
        chosen, level, scale = batch["chosen"], batch["level"], batch["scale"]
        sigma, following = levels[level].to(device), lower[level].to(device)
        noisy = process.noised(data.latents[chosen].to(device), batch["noise"].to(device), sigma)
        condition = {name: value[chosen].to(device) for name, value in data.condition.items()}
        reached = guided_step(base, process, noisy, sigma, following, condition, untold, scale.to(device))
        condition["guidance"] = guidance_embedding(scale).to(device)
        answer = target(reached, process.time(following), condition).float()
        return {
            "noisy": noisy,
            "sigma": sigma,
            "condition": condition,
            "target": process.clean(answer, reached, following),
            "weights": data.weights[chosen].to(device),
        }

    def loss(state: State) -> dict[str, Tensor]:
        answer = student(state["noisy"], process.time(state["sigma"]), state["condition"]).float()
        x0 = process.clean(answer, state["noisy"], state["sigma"])
        unweighted = (x0 - state["target"]).square().mean().detach()
        return {"total": consistency_loss(x0, state["target"], state["weights"]), "unweighted": unweighted}

    player = Player("student", student.model, loss, learning_rate)
    train(
        [player],
        batch_of,
        prepare,
        settings,
        device=device,
        checkpoints=checkpoints,
        fingerprint=fingerprint,
        log=log,
        track=track,
    )
    player.finish()
    return student
