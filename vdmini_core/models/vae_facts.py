"""What a VAE makes of clips, from its config alone."""

from collections.abc import Mapping
from typing import Any

from vdmini_core.artifacts import Record

LatentShape = tuple[int, int, int, int]
"""C, T, h, w"""


class VAEFacts(Record):
    """Pixels of a side to one latent, frames to one latent, whether the first frame has one of its own, channels."""

    spatial: int
    temporal: int
    causal: bool
    channels: int

    def latent_shape(self, frames: int, height: int, width: int) -> LatentShape:
        """C, T, h, w of such a clip; ValueError where a frame or pixel would be left over."""
        first = int(self.causal)
        if (frames - first) % self.temporal:
            below = (frames - first) // self.temporal * self.temporal + first
            raise ValueError(
                f"{frames} frames do not fit a VAE that makes one latent of {self.temporal}"
                f"{' after the first' * first}; make them {below} or {below + self.temporal} (data.frames)"
            )
        if height % self.spatial or width % self.spatial:
            raise ValueError(
                f"{height} x {width} pixels are no multiples of {self.spatial}, as the VAE needs (data.size)"
            )
        frames = (frames - first) // self.temporal + first
        return self.channels, frames, height // self.spatial, width // self.spatial


def vae_facts(config: Mapping[str, Any]) -> VAEFacts | None:
    """What a VAE's config.json says, or None for a class that is not known."""
    halvings = len(config.get("block_out_channels") or ()) - 1
    frames, stride = config.get("temporal_compression_ratio"), config.get("spatial_compression_ratio")
    factors = {
        "AutoencoderKL": (2**halvings, 1),
        "AutoencoderKLTemporalDecoder": (2**halvings, 1),
        "AutoencoderKLCogVideoX": (2**halvings, frames or 4),
        "AutoencoderKLHunyuanVideo": (stride or 8, frames or 4),
        "AutoencoderKLHunyuanVideo15": (stride or 16, frames or 4),
        "AutoencoderKLLTXVideo": (stride or 32, frames or 8),
        "AutoencoderKLMochi": (8, 6),
        "AutoencoderKLWan": (config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)),
    }
    # A compressed decoder's class is named after the stock one (models/decoder.py).
    if (name := str(config.get("_class_name")).removeprefix("VDMini")) not in factors:
        return None
    spatial, temporal = factors[name]
    channels = config.get("latent_channels") or config.get("z_dim") or 4
    return VAEFacts(spatial=int(spatial), temporal=temporal, causal=temporal > 1, channels=channels)
