"""What every teacher's pipeline offers the core, whatever its class: roles, conditions, latents, sampling."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from vdmini_core.artifacts import Record, read_json
from vdmini_core.diffusion.process import Process
from vdmini_core.models.decoder import decoded
from vdmini_core.models.graph import Condition, Denoiser
from vdmini_core.models.vae_facts import LatentShape, VAEFacts, vae_facts
from vdmini_core.settings import EncodeSettings

ROLES = ("denoiser", "vae", "conditioner")

Noise = Callable[[int], Tensor]
"""noise(k) is the k-th draw of standard normal noise [B, C, T, h, w]; 0 is where sampling starts."""

Answering = Callable[[Tensor, Tensor, Condition], Tensor]
"""What is sampled from: a Denoiser, or what answers in its place."""


class ClipShape(Record):
    """vdmini.json in a pipeline folder: the clips that the model was made for."""

    frames: int = Field(gt=0)
    height: int = Field(gt=0, description="pixels, as width")
    width: int = Field(gt=0)


class Pipeline(ABC):
    """A diffusers pipeline folder by roles: denoiser, VAE, and conditioner (image or text encoders).

    Roles that were not asked for at loading are not in memory; training needs the denoiser alone.
    """

    folders: ClassVar[dict[str, tuple[str, ...]]]
    """Role -> the subfolders of the pipeline that hold its weights."""
    files: ClassVar[tuple[str, ...]]
    """Further files that the pipeline cannot do without."""
    conditioned_on: ClassVar[Literal["image", "text"]]
    """What a user gives to have a clip made."""
    process: Process

    def __init__(self, folder: Path, models: dict[str, Any]) -> None:
        self.folder = folder
        self.models = models

    @classmethod
    def load(cls, folder: Path, roles: Iterable[str] = ROLES, device: torch.device | str = "cpu") -> Self:
        """Load the named roles of a pipeline folder in float32; UnusableModel names what is missing."""
        cls(folder, {})  # what its settings rule out is refused before gigabytes are read
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

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T', h, w] -> clips [B, 3, T, H, W] in [-1, 1], clip by clip."""
        return torch.cat([decoded(self.vae, clip) for clip in latents.split(1)]).float().clamp(-1, 1)

    @abstractmethod
    def condition(
        self, images: Tensor, captions: Sequence[str], settings: EncodeSettings, generator: torch.Generator
    ) -> Condition:
        """What the denoiser is told of clips: from first frames [B, 3, H, W] in [-1, 1], or from captions."""

    @property
    def vae_facts(self) -> VAEFacts:
        """What the VAE makes of clips."""
        facts = vae_facts({**self.vae.config, "_class_name": type(self.vae).__name__})
        assert facts is not None
        return facts

    def latent_shape(self, frames: int, height: int, width: int) -> LatentShape:
        """C, T', h, w of a clip of so many frames and pixels; ValueError where some would be dropped."""
        return self.vae_facts.latent_shape(frames, height, width)

    def default_shape(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels that the model was made for: what vdmini.json says, if it is there."""
        file = self.folder / "vdmini.json"
        if not file.is_file():
            return self.stock_shape()
        shape = read_json(file, ClipShape)
        return shape.frames, shape.height, shape.width

    @abstractmethod
    def stock_shape(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels that the stock pipeline makes unless told otherwise."""

    @abstractmethod
    def sample(self, denoiser: Answering, noise: Noise, condition: Condition, steps: int) -> Tensor:
        """Latents [B, C, T', h, w] with the folder's own scheduler settings, without classifier-free guidance."""


class FramewisePipeline(Pipeline):
    """A pipeline whose VAE encodes frame by frame and has one scaling factor, as Stable Diffusion's."""

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] -> scaled latents [B, C, T, h, w], the posterior's mode."""
        frames = clips.transpose(1, 2)
        latents: Tensor = self.vae.encode(frames.flatten(0, 1).to(self.vae.device)).latent_dist.mode()
        return (latents * self.vae.config.scaling_factor).unflatten(0, frames.shape[:2]).transpose(1, 2)  # type: ignore[no-any-return]
