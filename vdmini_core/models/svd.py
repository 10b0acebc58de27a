"""Stable Video Diffusion as a pipeline: VAE, image encoder, sampler around the U-Net."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from vdmini_core.diffusion.process import VPrediction
from vdmini_core.models.decoder import load_vae
from vdmini_core.models.graph import Condition
from vdmini_core.models.loading import UnusableModel, load_component
from vdmini_core.models.pipeline import Answering, FramewisePipeline, Noise
from vdmini_core.models.unet import load_unet
from vdmini_core.settings import EncodeSettings


class SVD(FramewisePipeline):
    """`StableVideoDiffusionPipeline`: image to video, EDM with v-prediction."""

    folders: ClassVar = {"denoiser": ("unet",), "vae": ("vae",), "conditioner": ("image_encoder",)}
    files = ("scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json")
    conditioned_on = "image"
    process = VPrediction()

    def __init__(self, folder: Path, models: dict[str, Any]) -> None:
        super().__init__(folder, models)
        self.scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        config = self.scheduler.config
        if (config.prediction_type, config.timestep_type) != ("v_prediction", "continuous"):
            raise UnusableModel(
                f"{folder}/scheduler uses {config.prediction_type} and {config.timestep_type} timesteps; SVD's "
                "preconditioning needs v_prediction and continuous"
            )
        if config.sigma_min and config.sigma_max:
            self.process = VPrediction(config.sigma_min, config.sigma_max)

    @classmethod
    def load_part(cls, name: str, folder: Path, device: torch.device | str) -> Any:
        if name == "unet":
            return load_unet(folder, device)
        if name == "vae":
            return load_vae(AutoencoderKLTemporalDecoder, folder, device)
        return load_component(CLIPVisionModelWithProjection, folder).to(device)

    @torch.no_grad()
    def condition(
        self, images: Tensor, captions: Sequence[str], settings: EncodeSettings, generator: torch.Generator
    ) -> Condition:
        """What the stock pipeline tells the denoiser of first frames [B, 3, H, W]; captions go unread.

        Image latents are the VAE's mode of the noise-augmented frame and are *not* scaled; the model
        is told fps - 1.
        """
        encoder = self._part("image_encoder")
        noise = torch.randn(images.shape, generator=generator)
        noisy = (images + settings.noise_augmentation * noise).to(self.vae.device)
        processor = CLIPImageProcessorPil.from_pretrained(self.folder / "feature_extractor")
        pixels = processor(
            images=(_resize_with_antialiasing(images, (224, 224)) + 1) / 2,
            do_normalize=True,
            do_center_crop=False,
            do_resize=False,
            do_rescale=False,
            return_tensors="pt",
        ).pixel_values
        return {
            "image_latents": self.vae.encode(noisy).latent_dist.mode(),
            "image_embedding": encoder(pixels.to(encoder.device)).image_embeds[:, None],
            "added_time_ids": added_time_ids(settings).expand(len(images), -1).to(self.vae.device),
        }

    def stock_shape(self) -> tuple[int, int, int]:
        config = self.denoiser.model.config
        side = config.sample_size * self.vae_facts.spatial
        return int(config.num_frames), side, side

    @torch.no_grad()
    def sample(self, denoiser: Answering, noise: Noise, condition: Condition, steps: int) -> Tensor:
        """Euler steps over the folder's own noise levels; no classifier-free guidance."""
        self.scheduler.set_timesteps(steps)
        a, _ = self.process.shares(self.scheduler.sigmas[0])
        start = noise(0) * float(self.scheduler.init_noise_sigma * a)
        return self.process.sample(lambda x, time: denoiser(x, time, condition), start, self.scheduler.sigmas)


def added_time_ids(settings: EncodeSettings) -> Tensor:
    """fps - 1, motion bucket and noise augmentation as SVD is told them, [1, 3]."""
    return torch.tensor([[settings.fps - 1.0, float(settings.motion_bucket_id), settings.noise_augmentation]])
