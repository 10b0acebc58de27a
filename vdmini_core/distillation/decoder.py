"""Recovers a compressed VAE decoder: towards what the original decoder makes of the cached latents, no encoder needed.

L = reconstruction (L1 + L2) + perceptual + temporal + adversarial, each with its weight. The perceptual distance is
that of the features of the project's own evaluator, layer by layer and normalised over channels as in LPIPS (Zhang et
al. 2018); the adversarial one is a hinge game with a small discriminator of patches in short windows.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdmini_core.data.latents import LatentCache
from vdmini_core.distillation.losses import discriminator_hinge_loss, generator_hinge_loss
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.evaluation.metrics.perceptual import perceptual_distances
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import DecoderSettings
from vdmini_core.training.distributed import Batch, Losses, State, gathered, is_main
from vdmini_core.training.loop import train
from vdmini_core.training.player import Player, averaged

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(clips [B, 3, T, H, W] in [-1, 1], targets) -> a scalar; 0 is equal"""


class PatchDiscriminator(nn.Module):
    """Logits [B, 1, T, H / 4, W / 4] of clips [B, 3, T, H, W]: each sees 15 x 15 pixels of 5 frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(3, channels, (3, 3, 3), (1, 2, 2), (1, 1, 1)),
            nn.LeakyReLU(0.2),
            nn.Conv3d(channels, 2 * channels, (3, 3, 3), (1, 2, 2), (1, 1, 1)),
            nn.LeakyReLU(0.2),
            nn.Conv3d(2 * channels, 1, (1, 3, 3), 1, (0, 1, 1)),
        )

    def forward(self, clips: Tensor) -> Tensor:
        return self.layers(clips)  # type: ignore[no-any-return]


def evaluator_distance(evaluator: Evaluator) -> Perceptual:
    """Mean squared difference of unit features, of every layer of single frames and of the motion in the clip."""

    def layers(clips: Tensor) -> list[Tensor]:
        found, frames = [], clips.transpose(1, 2).flatten(0, 1)
        for stack, features in ((evaluator.content, frames), (evaluator.motion, clips - clips.mean(2, keepdim=True))):
            for layer in stack:
                features = layer(features)
                found.append(features)
        return found

    def distance(clips: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = layers(target)
        pairs = zip(layers(clips), wanted, strict=True)
        terms = [
            (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean() for a, b in pairs
        ]
        return torch.stack(terms).mean()

    return distance


def lpips_distance(device: torch.device) -> Perceptual:
    """LPIPS of single frames; ValueError names the extra where it is not installed."""
    network = perceptual_distances(("lpips",), device)["lpips"]

    def distance(clips: Tensor, target: Tensor) -> Tensor:
        ours, theirs = (frames.transpose(1, 2).flatten(0, 1) for frames in (clips, target))
        return network(ours, theirs).mean()

    return distance


def temporal_loss(clips: Tensor, target: Tensor) -> Tensor:
    """L1 of the differences from each frame to the next, [B, 3, T, H, W]: what changes, changes as in the target."""
    return F.l1_loss(clips.diff(dim=2), target.diff(dim=2))


class DecoderRecovery:
    """Computes the losses of one step; holds the networks, owns no optimizer."""

    def __init__(
        self,
        original: VAEDecoder,
        student: VAEDecoder,
        discriminator: PatchDiscriminator,
        perceptual: Perceptual,
        settings: DecoderSettings,
        device: torch.device,
    ) -> None:
        self.original, self.student, self.discriminator = original, student, discriminator
        self.perceptual, self.settings, self.device = perceptual, settings, device

    def draw(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Windows of the clips' latents: `frames` long and `crop` wide and high, at one random place for all."""
        latents = batch["latents"]
        for axis, size in ((2, self.settings.frames), (3, self.settings.crop), (4, self.settings.crop)):
            over = latents.shape[axis] - (size or latents.shape[axis])
            if over > 0:
                start = int(torch.randint(over + 1, (1,), generator=generator))
                latents = latents.narrow(axis, start, latents.shape[axis] - over)
        return {"ids": batch["ids"], "latents": latents}

    def adversarial_weight(self, step: int) -> float:
        """`adversarial_weight`, as far as the ramp has come."""
        timing = self.settings.discriminator
        into = step - timing.warmup_steps
        return self.settings.adversarial_weight * min(max(into / max(timing.ramp_steps, 1), 0.0), 1.0)

    def prepare(self, batch: Batch, step: int) -> State:
        """The original decoder's clips of the windows."""
        latents = batch["latents"].to(self.device)
        with torch.no_grad():
            target = self.original(latents).float().clamp(-1, 1)
        return {"latents": latents, "target": target, "weight": self.adversarial_weight(step)}

    def decoder_loss(self, state: State) -> Losses:
        """The weighted sum, and each term."""
        clips, target, weights = self.student(state["latents"]).float(), state["target"], self.settings
        state["fake"] = clips.detach()
        l1, l2 = F.l1_loss(clips, target), F.mse_loss(clips, target)
        losses = {"reconstruction": l1 + l2, "temporal": temporal_loss(clips, target)}
        total = weights.reconstruction_weight * losses["reconstruction"] + weights.temporal_weight * losses["temporal"]
        if weights.perceptual_weight > 0:
            losses["perceptual"] = self.perceptual(clips, target)
            total = total + weights.perceptual_weight * losses["perceptual"]
        if state["weight"] > 0:
            losses["adversarial"] = generator_hinge_loss([self.discriminator(clips)])
            total = total + state["weight"] * losses["adversarial"]
        return {"total": total, **losses}

    def discriminator_loss(self, state: State) -> Losses:
        """Hinge on clips of the original decoder and those that the student's turn left behind."""
        fake, real = self.discriminator(state["fake"]), self.discriminator(state["target"])
        gap = real.float().mean() - fake.float().mean()
        return {"total": discriminator_hinge_loss([fake], [real]), "real_minus_fake": gap.detach()}


def recover_decoder(
    original: VAEDecoder,
    student: VAEDecoder,
    data: LatentCache,
    perceptual: Perceptual,
    settings: DecoderSettings,
    device: torch.device,
    *,
    checkpoints: Path | None = None,
    fingerprint: str = "",
    log: Log = silent_log,
    track: Track = silent_track,
    should_stop: Callable[[], bool] = lambda: False,
    watch: Callable[[int, VAEDecoder], None] | None = None,
) -> None:
    """Train the student's decoder in place; it ends with its averaged (EMA) weights. The encoder is not touched.

    `watch(step, averaged student)` is called in the main process every `settings.validation.every` steps, and last.
    """
    loop = settings.loop
    torch.manual_seed(loop.seed)
    discriminator = PatchDiscriminator(settings.discriminator.channels).to(device)
    step = DecoderRecovery(original, student, discriminator, perceptual, settings, device)
    network = student.decoder
    players = [Player("decoder", network, step.decoder_loss, settings.learning_rate)]
    if settings.adversarial_weight > 0:
        rate = settings.discriminator.learning_rate
        players.append(Player("discriminator", discriminator, step.discriminator_loss, rate))

    def after_step(done: int) -> None:
        if done % settings.validation.every == 0 or done == loop.max_steps:
            weights = averaged(players[0])
            if watch is not None and is_main():
                watch(done, student.with_weights(weights))

    train(
        players,
        lambda position, generator: step.draw(data.shuffled(position, loop.batch_size, loop.seed), generator),
        step.prepare,
        loop,
        device=device,
        checkpoints=checkpoints,
        fingerprint=fingerprint,
        log=log,
        track=track,
        should_stop=should_stop,
        after_step=after_step if settings.validation.every else None,
    )
    assert players[0].ema is not None
    players[0].ema.copy_to(network)
    weights = gathered(network.state_dict())
    if is_main():
        student.model = student.with_weights(weights).model
