"""What every teacher's pipeline offers the core, whatever its class: roles, conditions, latents, sampling."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vdmini_core.diffusion.process import Process
from vdmini_core.models.graph import Condition, Denoiser
from vdmini_core.settings import EncodeSettings

ROLES = ("denoiser", "vae", "conditioner")

Noise = Callable[[int], Tensor]
"""noise(k) is the k-th draw of standard normal noise [B, C, T, h, w]; 0 is where sampling starts."""


class Pipeline(ABC):
    """A diffusers pipeline folder by roles: denoiser, VAE, and conditioner (image or text encoders).

    Roles that were not asked for at loading are not in memory; training needs the denoiser alone.
    """

    folders: ClassVar[dict[str, tuple[str, ...]]]
    """Role -> the subfolders of the pipeline that hold its weights."""
    files: ClassVar[tuple[str, ...]]
    """Further files that the pipeline cannot do without."""
    process: Process

    def __init__(self, folder: Path, models: dict[str, Any]) -> None:
        self.folder = folder
        self.models = models

    @classmethod
    def load(cls, folder: Path, roles: Iterable[str] = ROLES, device: torch.device | str = "cpu") -> Self:
        """Load the named roles of a pipeline folder in float32; UnusableModel names what is missing."""
        wanted = set(roles)
        names = [name for role in ROLES if role in wanted for name in cls.folders[role]]
        return cls(folder, {name: cls.load_part(name, folder / name, device) for name in names})

    @classmethod
    @abstractmethod
    def load_part(cls, name: str, folder: Path, device: torch.device | str) -> Any:
        """One subfolder as a model, frozen; a Denoiser for the role denoiser."""

    @classmethod
    def denoiser_folder(cls) -> str:
        """Where the denoiser lies in the pipeline folder, `unet` or `transformer`."""
        return cls.folders["denoiser"][0]

    @property
    def denoiser(self) -> Denoiser:
        return self._part(self.denoiser_folder())  # type: ignore[no-any-return]

    @property
    def vae(self) -> Any:
        return self._part("vae")

    @property
    def device(self) -> torch.device:
        """Where the loaded parts are."""
        model = next(iter(self.models.values()))
        return next(getattr(model, "model", model).parameters()).device  # type: ignore[no-any-return]

    def _part(self, name: str) -> Any:
        assert name in self.models, f"loaded without the {name}"
        return self.models[name]

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of every loaded part."""
        networks = {name: part.model if isinstance(part, Denoiser) else part for name, part in self.models.items()}
        return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}

    @abstractmethod
    def encode(self, clips: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] -> latents as the denoiser wants them [B, C, T', h, w]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T', h, w] -> clips [B, 3, T, H, W] in [-1, 1]."""

    @abstractmethod
    def condition(
        self, images: Tensor, captions: Sequence[str], settings: EncodeSettings, generator: torch.Generator
    ) -> Condition:
        """What the denoiser is told of clips: from first frames [B, 3, H, W] in [-1, 1], or from captions."""

    @abstractmethod
    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """C, T', h, w of a clip of so many frames and pixels."""

    @abstractmethod
    def default_shape(self) -> tuple[int, int, int]:
        """Frames, height and width that the model was made for."""

    @abstractmethod
    def sample(self, denoiser: Denoiser, noise: Noise, condition: Condition, steps: int) -> Tensor:
        """Latents [B, C, T', h, w] with the folder's own scheduler settings, without classifier-free guidance."""
