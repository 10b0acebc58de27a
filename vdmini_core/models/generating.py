"""One clip from one image or caption, with the teacher or any student."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vdmini_core.models import Pipeline
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.models.decoder_pieces import decoded_in_pieces
from vdmini_core.settings import EncodeSettings


def read_image(path: Path, height: int, width: int) -> Tensor:
    """An image file as [1, 3, height, width] in [-1, 1]: resized just to cover it, centre cropped."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is no readable image: {error}") from None
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def generate_clip(
    pipeline: Pipeline,
    image: Tensor,
    caption: str,
    *,
    frames: int,
    steps: int,
    seed: int,
    told: EncodeSettings,
    tile: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """A clip [3, T, H, W] in [-1, 1] of the size of `image` [1, 3, H, W].

    With `tile` (latents of a side) or `chunk` (latent frames) it is decoded in such pieces, to the same clip. An
    image-to-video model begins with the image, a text-to-video model follows the caption.
    """
    generator = torch.Generator().manual_seed(seed)
    condition = pipeline.condition(image, [caption], told, generator)
    shape = pipeline.latent_shape(frames, *image.shape[-2:])
    draws = [torch.randn(1, *shape, generator=generator).to(pipeline.device) for _ in range(steps)]
    latents = pipeline.sample(pipeline.denoiser, lambda index: draws[index], condition, steps)
    if tile is None and chunk is None:
        return pipeline.decode(latents)[0]
    return decoded_in_pieces(VAEDecoder(pipeline.vae), latents, frames=chunk, tile=tile)[0].float().clamp(-1, 1)
