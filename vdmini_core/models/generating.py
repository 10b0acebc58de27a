"""One clip from one image, with the teacher or any student."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vdmini_core.models import SVD


def read_image(path: Path, size: int) -> Tensor:
    """An image file as [1, 3, size, size] in [-1, 1]: short side resized, centre cropped."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is no readable image: {error}") from None
    scale = size / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def generate_clip(
    pipeline: SVD,
    image: Tensor,
    *,
    frames: int,
    steps: int,
    seed: int,
    fps: int,
    motion_bucket_id: int,
    noise_augmentation: float,
) -> Tensor:
    """A clip [3, T, H, W] in [-1, 1] that begins with `image` [1, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    condition = pipeline.condition(
        image, fps=fps, motion_bucket_id=motion_bucket_id, noise_augmentation=noise_augmentation, generator=generator
    )
    channels, height, width = condition["image_latents"].shape[1:]
    noise = torch.randn(1, channels, frames, height, width, generator=generator).to(pipeline.vae.device)
    return pipeline.decode(pipeline.sample(pipeline.denoiser, noise, condition, steps))[0]
