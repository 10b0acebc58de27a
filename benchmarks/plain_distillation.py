"""The loop that one writes first, to compare with: encodes every step's clips, and asks the teacher for every loss."""

from functools import partial

import torch
from torch import Tensor, nn

from vdmini_core.diffusion.process import Process
from vdmini_core.distillation.heads import Discriminator
from vdmini_core.distillation.losses import (
    denoising_loss,
    discriminator_hinge_loss,
    generator_hinge_loss,
    individual_content_loss,
)
from vdmini_core.distillation.taps import encoder_features, tapped
from vdmini_core.models import Condition, Denoiser, Pipeline
from vdmini_core.settings import DistillSettings, EncodeSettings


class PlainLoop:
    """The same losses and optimizers as `distill`, one step a call, on pixels [B, 3, T, H, W]."""

    def __init__(
        self, pipeline: Pipeline, student: Denoiser, matches: dict[str, str], pixels: Tensor, settings: DistillSettings
    ) -> None:
        device = pipeline.device
        self.pipeline, self.teacher, self.student = pipeline, pipeline.denoiser, student
        self.process: Process = pipeline.process
        self.pixels, self.settings, self.device = pixels, settings, device
        self.heads = Discriminator(self.teacher.encoder_widths()).to(device)
        teacher_taps, student_taps = self.teacher.tap_modules(), student.tap_modules()
        self.teacher_taps = {name: teacher_taps[name] for name in matches}
        self.student_taps = {name: student_taps[match] for name, match in matches.items()}
        self.student.model.requires_grad_(True)
        self.optimizers = [
            torch.optim.AdamW(module.parameters(), lr=rate, betas=settings.loop.betas, weight_decay=0)
            for module, rate in (
                (student.model, settings.learning_rate),
                (self.heads, settings.discriminator.learning_rate),
            )
        ]
        self.averages = [p.detach().clone() for p in student.model.parameters()]
        self.generator = torch.Generator().manual_seed(0)
        half = settings.loop.precision != "fp32"
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=half)

    def step(self) -> None:
        with torch.no_grad():
            x0, condition = self.encoded()
        count = len(x0)
        sigma, noise, other_sigma, other_noise = (
            value.to(self.device)
            for value in (
                torch.randn(count, generator=self.generator).exp(),
                torch.randn(x0.shape, generator=self.generator),
                torch.randn(count, generator=self.generator).exp(),
                torch.randn(x0.shape, generator=self.generator),
            )
        )
        noisy = self.process.noised(x0, noise, sigma)

        def predicted(denoiser: Denoiser) -> Tensor:
            return denoiser(noisy, self.process.time(sigma), condition)

        def features(answer: Tensor) -> list[Tensor]:
            clean = self.process.clean(answer.float(), noisy, sigma)
            again = self.process.noised(clean, other_noise, other_sigma)
            return encoder_features(self.teacher, again, self.process.time(other_sigma), condition)

        level = other_sigma.log() / 4
        with self.autocast():
            with tapped(self.student_taps) as found:
                answer = predicted(self.student)
                own = dict(found)
            with torch.no_grad(), tapped(self.teacher_taps) as found:  # for ICD
                predicted(self.teacher)
                wanted = dict(found)
            total = denoising_loss(answer, self.process.target(x0, noise, sigma), self.process.velocity_weight(sigma))
            icd = individual_content_loss([own[n] for n in self.teacher_taps], [wanted[n] for n in self.teacher_taps])
            total = total + self.settings.icd_weight * icd
            self.heads.requires_grad_(False)
            total = total + self.settings.mca_weight * generator_hinge_loss(self.heads(features(answer), level))
        self.move(0, self.student.model, total)
        self.heads.requires_grad_(True)
        with self.autocast():
            with torch.no_grad():
                real = features(predicted(self.teacher))  # for the heads
                fake = features(answer.detach())
            total = discriminator_hinge_loss(self.heads(fake, level), self.heads(real, level))
        self.move(1, self.heads, total)
        with torch.no_grad():
            for average, weight in zip(self.averages, self.student.model.parameters(), strict=True):
                average.lerp_(weight, 1 - self.settings.loop.ema_decay)

    def encoded(self) -> tuple[Tensor, Condition]:
        """Latents and condition of the clips, in float32 as stage encode makes them."""
        told = [""] * len(self.pixels)
        condition = self.pipeline.condition(self.pixels[:, :, 0], told, EncodeSettings(), self.generator)
        return self.pipeline.encode(self.pixels), {name: value.to(self.device) for name, value in condition.items()}

    def move(self, index: int, module: nn.Module, total: Tensor) -> None:
        total.backward()
        nn.utils.clip_grad_norm_(module.parameters(), self.settings.loop.clip_norm)
        self.optimizers[index].step()
        self.optimizers[index].zero_grad(set_to_none=True)
