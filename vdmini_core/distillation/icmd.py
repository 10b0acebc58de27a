"""One ICMD training step: what student and discriminator share, and the loss of each.

Individual Content and Motion Dynamics distillation (arXiv 2411.18375): the base model's own loss, the
teacher's features frame by frame (ICD), and an adversarial loss on multi-frame features (MCA).
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.diffusion.process import Process
from vdmini_core.distillation.heads import Discriminator
from vdmini_core.distillation.losses import (
    discriminator_hinge_loss,
    generator_hinge_loss,
    individual_content_loss,
    task_loss,
)
from vdmini_core.distillation.taps import encoder_features, tapped
from vdmini_core.distillation.validation import Validation, best_checkpoint
from vdmini_core.models import Denoiser
from vdmini_core.models.graph import config_of, rebuild
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import DistillSettings
from vdmini_core.training.distributed import Batch, State, gathered, is_main, of_main
from vdmini_core.training.loop import train
from vdmini_core.training.player import Player, averaged, restore


class ICMD:
    """Computes the losses of one step; holds the networks, owns no optimizer.

    `matches` maps every teacher unit that survived to the student's unit made from it; `process` is the
    teacher's noise algebra.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        discriminator: Discriminator,
        matches: dict[str, str],
        process: Process,
        settings: DistillSettings,
        device: torch.device,
    ) -> None:
        self.teacher, self.student, self.discriminator = teacher, student, discriminator
        self.process, self.settings, self.device = process, settings, device
        teacher_taps, student_taps = teacher.tap_modules(), student.tap_modules()
        self.teacher_taps = {name: teacher_taps[name] for name in matches}
        self.student_taps = {name: student_taps[match] for name, match in matches.items()}

    def mca_weight(self, step: int) -> float:
        """0 while the heads warm up, then a linear ramp to `mca_weight`."""
        timing = self.settings.discriminator
        into = step - timing.warmup_steps
        return self.settings.mca_weight * min(max(into / max(timing.ramp_steps, 1), 0.0), 1.0)

    def draw(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The clips with their noise levels and noise, everything that is random in a step."""
        shape = batch["latents"].shape
        heads = self.settings.discriminator
        return batch | {
            "sigma": self.process.draw(shape[0], self.settings.sigma_mean, self.settings.sigma_std, generator),
            "noise": torch.randn(shape, generator=generator),
            "heads_sigma": self.process.draw(shape[0], heads.sigma_mean, heads.sigma_std, generator),
            "heads_noise": torch.randn(shape, generator=generator),
        }

    def prepare(self, batch: Batch, step: int) -> State:
        """Noise the clips, and run the teacher once on what the student will see."""
        x0, noise, sigma = batch["latents"], batch["noise"], batch["sigma"]
        state: State = {
            "noisy": self.process.noised(x0, noise, sigma).to(self.device),
            "sigma": sigma.to(self.device),
            "heads_sigma": batch["heads_sigma"].to(self.device),
            "heads_noise": batch["heads_noise"].to(self.device),
            "condition": condition_of(batch, self.device),
            "mca_weight": self.mca_weight(step),
        }
        with torch.no_grad(), tapped(self.teacher_taps) as features:
            output = self._predict(self.teacher, state)
            state["teacher_features"] = dict(features)
            by_data = self.settings.target == "data"
            state["target"] = self.process.target(x0, noise, sigma).to(self.device) if by_data else output.float()
            if self.settings.mca_weight > 0:
                x0_teacher = self.process.clean(output.float(), state["noisy"], state["sigma"])
                state["real"] = self._renoised_features(x0_teacher, state)
        return state

    def student_loss(self, state: State) -> dict[str, Tensor]:
        """L_task + icd_weight * L_ICD + mca_weight(step) * L_MCA."""
        with tapped(self.student_taps) as features:
            output = self._predict(self.student, state)
            own = dict(features)
        task = task_loss(output, state["target"], self.process.velocity_weight(state["sigma"]))
        icd = individual_content_loss(
            [own[name] for name in self.teacher_taps],
            [state["teacher_features"][name] for name in self.teacher_taps],
            normalised=self.settings.icd_distance == "normalised",
        )
        losses = {"task": task, "icd": icd}
        total = task + self.settings.icd_weight * icd
        if self.settings.mca_weight > 0:
            x0_student = self.process.clean(output.float(), state["noisy"], state["sigma"])
            with torch.set_grad_enabled(state["mca_weight"] > 0):
                fake = self._renoised_features(x0_student, state)
                losses["mca"] = generator_hinge_loss(self.discriminator(fake, state["heads_sigma"].log() / 4))
            state["fake"] = [feature.detach() for feature in fake]
            total = total + state["mca_weight"] * losses["mca"]
        return {"total": total, **losses}

    def discriminator_loss(self, state: State) -> dict[str, Tensor]:
        """Hinge on the features the student's step left behind; no gradient reaches the student."""
        level = state["heads_sigma"].log() / 4
        fake, real = self.discriminator(state["fake"], level), self.discriminator(state["real"], level)
        gap = torch.stack([(r.float().mean() - f.float().mean()) for f, r in zip(fake, real, strict=True)]).mean()
        return {"total": discriminator_hinge_loss(fake, real), "real_minus_fake": gap.detach()}

    def _predict(self, denoiser: Denoiser, state: State) -> Tensor:
        return denoiser(state["noisy"], self.process.time(state["sigma"]), state["condition"])

    def _renoised_features(self, x0: Tensor, state: State) -> list[Tensor]:
        """Multi-frame features of the frozen teacher encoder for a clip re-noised to sigma'."""
        sigma = state["heads_sigma"]
        noisy = self.process.noised(x0, state["heads_noise"], sigma)
        return encoder_features(self.teacher, noisy, self.process.time(sigma), state["condition"])


def distill(
    teacher: Denoiser,
    student: Denoiser,
    matches: dict[str, str],
    process: Process,
    data: LatentCache,
    settings: DistillSettings,
    device: torch.device,
    *,
    checkpoints: Path | None = None,
    fingerprint: str = "",
    log: Log = silent_log,
    track: Track = silent_track,
    should_stop: Callable[[], bool] = lambda: False,
    validation: Validation | None = None,
) -> None:
    """Train `student` in place towards `teacher`; ends with its averaged (EMA) weights, the last or the best.

    Under FSDP2 it is whole again in the main process, and stays sharded in the others. `validation` is for the main
    process, and called every `settings.validation.every` steps.
    """
    loop, student_class = settings.loop, type(student.model)
    torch.manual_seed(loop.seed)
    discriminator = Discriminator(teacher.encoder_widths()).to(device)
    step = ICMD(teacher, student, discriminator, matches, process, settings, device)
    student.model.eval()  # dropout would draw from no generator of the step
    players = [Player("student", student.model, step.student_loss, settings.learning_rate)]
    if settings.mca_weight > 0:
        rate = settings.discriminator.learning_rate
        players.append(Player("discriminator", discriminator, step.discriminator_loss, rate))

    def after_step(done: int) -> int | None:
        if done % settings.validation.every == 0:
            weights = averaged(players[0])  # shards of every process
            if validation is not None:
                validation(done, type(student)(rebuild(student_class, config_of(student.model), weights)))
        return None if validation is None else validation.best(done)

    with ExitStack() as stack:
        for denoiser in (teacher, student):
            if settings.checkpointing:
                stack.enter_context(denoiser.checkpointed())
            if settings.compile:
                stack.enter_context(denoiser.compiled())
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
    if settings.keep == "best":
        best = None if validation is None else validation.best(loop.max_steps)
        restore(players, best_checkpoint(checkpoints, of_main(best or 0, device), fingerprint))
    assert players[0].ema is not None
    players[0].ema.copy_to(student.model)
    weights = gathered(student.model.state_dict())
    if is_main():
        student.model = rebuild(student_class, config_of(student.model), weights)
    student.model.eval().requires_grad_(False)
