"""One ICMD training step: what student and discriminator share, and the loss of each.

Individual Content and Motion Dynamics distillation (arXiv 2411.18375): the base model's own loss, the
teacher's features frame by frame (ICD), and an adversarial loss on multi-frame features (MCA).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.diffusion.process import Process
from vdmini_core.distillation.answers import TeacherAnswers, answer_needed
from vdmini_core.distillation.heads import Discriminator, discriminator_losses, verdict
from vdmini_core.distillation.losses import generator_hinge_loss, individual_content_loss
from vdmini_core.distillation.taps import renoised_features, tapped
from vdmini_core.distillation.task_losses import TASK_LOSSES
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

    `matches` maps every teacher unit that survived to the student's unit made from it; `channels` lists, for units
    whose feature lost some, the teacher's channels that the student's still has, which alone are compared. `process` is
    the teacher's noise algebra. The teacher is None where no loss reads it (`answers.teacher_needed`): with `answers`,
    kept on disk, it does not run.
    """

    def __init__(
        self,
        teacher: Denoiser | None,
        student: Denoiser,
        discriminator: Discriminator | None,
        matches: dict[str, str],
        process: Process,
        settings: DistillSettings,
        device: torch.device,
        answers: TeacherAnswers | None = None,
        channels: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.teacher, self.student, self.discriminator = teacher, student, discriminator
        self.process, self.settings, self.device, self.answers = process, settings, device, answers
        self.task = TASK_LOSSES[settings.task](teacher, student, process, settings, device)
        teacher_taps, student_taps = teacher.tap_modules() if teacher else {}, student.tap_modules()
        self.teacher_taps = {name: teacher_taps[name] for name in matches}
        self.student_taps = {name: student_taps[match] for name, match in matches.items()}
        lists = channels or {}
        self.channels = {name: list(lists[name]) if name in lists else slice(None) for name in matches}

    def ramp(self, step: int) -> float:
        """Share of their weight that adversarial losses have: 0 while the heads warm up, then rising to 1."""
        timing = self.settings.discriminator
        into = step - timing.warmup_steps
        return min(max(into / max(timing.ramp_steps, 1), 0.0), 1.0)

    def mca_weight(self, step: int) -> float:
        """`mca_weight`, as far as the ramp has come."""
        return self.settings.mca_weight * self.ramp(step)

    def draw(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The clips with their noise levels and noise, everything that is random in a step."""
        shape = batch["latents"].shape
        heads = self.settings.discriminator
        if self.answers is None:
            drawn = self.task.draw(shape[0], generator) | {"noise": torch.randn(shape, generator=generator)}
        else:
            drawn = self.answers.draw(batch["ids"], shape[1:], generator)
        return {
            **batch,
            **drawn,
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
            "ramp": self.ramp(step),
            "mca_weight": self.mca_weight(step),
        }
        with torch.no_grad():
            answer = None
            if self.answers is not None:
                answer = self.answers.read(batch["ids"], batch["draw"]).to(self.device)
            elif answer_needed(self.settings):
                with tapped(self.teacher_taps) as features:
                    answer = self._predict(self.teacher, state)
                    compared = {name: feature[:, self.channels[name]] for name, feature in features.items()}
                    state["teacher_features"] = compared
            if self.settings.mca_weight > 0:
                assert answer is not None
                x0_teacher = self.process.clean(answer.float(), state["noisy"], state["sigma"])
                state["real"] = self._renoised_features(x0_teacher, state)
            return state | self.task.prepare(batch, state, answer)

    def student_loss(self, state: State) -> dict[str, Tensor]:
        """L_task + icd_weight * L_ICD + mca_weight(step) * L_MCA."""
        with tapped(self.student_taps) as features:
            output = self._predict(self.student, state)
            own = dict(features)
        fake: list[Tensor] = []
        if self.settings.mca_weight > 0 or self.task.adversarial:
            x0_student = self.process.clean(output.float(), state["noisy"], state["sigma"])
            with torch.set_grad_enabled(state["ramp"] > 0):
                fake = self._renoised_features(x0_student, state)
            state["fake"] = [feature.detach() for feature in fake]

        losses = self.task.loss(output, fake, state)
        total = losses["task"]
        if self.settings.icd_weight > 0:
            losses["icd"] = individual_content_loss(
                [own[name] for name in self.teacher_taps],
                [state["teacher_features"][name] for name in self.teacher_taps],
                normalised=self.settings.icd_distance == "normalised",
            )
            total = total + self.settings.icd_weight * losses["icd"]
        if self.settings.mca_weight > 0:
            assert self.discriminator is not None
            with torch.set_grad_enabled(state["ramp"] > 0):
                losses["mca"] = generator_hinge_loss(verdict(self.discriminator, fake, state))
            total = total + state["mca_weight"] * losses["mca"]
        return {"total": total, **losses}

    def discriminator_loss(self, state: State) -> dict[str, Tensor]:
        """Hinge on the features the student's step left behind; no gradient reaches the student."""
        assert self.discriminator is not None
        return discriminator_losses(self.discriminator, state["fake"], state["real"], state)

    def _predict(self, denoiser: Denoiser | None, state: State) -> Tensor:
        assert denoiser is not None
        return denoiser(state["noisy"], self.process.time(state["sigma"]), state["condition"])

    def _renoised_features(self, x0: Tensor, state: State) -> list[Tensor]:
        assert self.teacher is not None
        return renoised_features(self.teacher, self.process, x0, state)


def distill(
    teacher: Denoiser | None,
    student: Denoiser,
    matches: dict[str, str],
    process: Process,
    data: LatentCache,
    settings: DistillSettings,
    device: torch.device,
    *,
    answers: TeacherAnswers | None = None,
    channels: Mapping[str, Sequence[int]] | None = None,
    checkpoints: Path | None = None,
    fingerprint: str = "",
    log: Log = silent_log,
    track: Track = silent_track,
    should_stop: Callable[[], bool] = lambda: False,
    validation: Validation | None = None,
) -> None:
    """Train `student` in place towards `teacher`, or with `answers` alone; `matches` and `channels` as in `ICMD`.

    It ends with its averaged (EMA) weights, the last or the best.

    Under FSDP2 it is whole again in the main process, and stays sharded in the others. `validation` is for the main
    process, and called every `settings.validation.every` steps.
    """
    loop, student_class = settings.loop, type(student.model)
    torch.manual_seed(loop.seed)
    discriminator = Discriminator(teacher.encoder_widths()).to(device) if teacher else None
    step = ICMD(teacher, student, discriminator, matches, process, settings, device, answers, channels)
    student.model.eval()  # dropout would draw from no generator of the step
    players = [Player("student", student.model, step.student_loss, settings.learning_rate)]
    if settings.mca_weight > 0:
        assert discriminator is not None
        rate = settings.discriminator.learning_rate
        players.append(Player("discriminator", discriminator, step.discriminator_loss, rate))
    players += step.task.players()

    def after_step(done: int) -> int | None:
        if done % settings.validation.every == 0:
            weights = averaged(players[0])  # shards of every process
            if validation is not None:
                averages = rebuild(student_class, config_of(student.model), weights).to(device)
                validation(done, type(student)(averages))
        return None if validation is None else validation.best(done)

    with ExitStack() as stack:
        for denoiser in (teacher, student) if teacher else (student,):
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
