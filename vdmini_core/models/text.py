"""Text to video: ModelScope's U-Net pipeline, which VideoCrafter2 and T2V-Turbo-v2 are converted to, and Wan 2.1.

The stock pipelines ask the network twice a step, with and without the prompt (classifier-free guidance).
Ours ask once, which is the stock pipeline at guidance_scale = 1, so that teacher and student are compared by
what they answer; a scale that was distilled into a model is part of its condition instead.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, UMT5EncoderModel

from vdmini_core.diffusion.process import EpsilonPrediction, FlowMatching
from vdmini_core.models.decoder import latent_statistics, load_vae
from vdmini_core.models.graph import Condition, config_of
from vdmini_core.models.loading import UnusableModel, load_component
from vdmini_core.models.pipeline import Answering, FramewisePipeline, Noise, Pipeline
from vdmini_core.models.transformer import load_transformer
from vdmini_core.models.unet import load_unet
from vdmini_core.models.vae_facts import LatentShape
from vdmini_core.models.videocrafter import guidance_embedding
from vdmini_core.settings import EncodeSettings

DISCRETE_SCHEDULERS = (
    LCMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)
# The only values that our samplers know, where a scheduler has the key at all.
EPSILON: dict[str, Any] = {"prediction_type": "epsilon"}
EPSILON |= dict.fromkeys(("clip_sample", "thresholding", "rescale_betas_zero_snr", "use_flow_sigmas"), False)
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}
FLOW |= dict.fromkeys(("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling", "thresholding"), False)


class TextToVideoUNet(FramewisePipeline):
    """`TextToVideoSDPipeline`: a discrete epsilon-predicting process, sampled by DDIM or as LCM."""

    folders: ClassVar = {"denoiser": ("unet",), "vae": ("vae",), "conditioner": ("text_encoder",)}
    files = ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "unet/config.json")
    conditioned_on = "text"
    process: EpsilonPrediction
    stock_frames = 16
    guidance_widths: ClassVar = {None: 0, 256: 1, 512: 2}
    """The U-Net's time_cond_proj_dim -> how many numbers it is told: the scale, then the motion guidance."""

    def __init__(self, folder: Path, models: dict[str, Any]) -> None:
        super().__init__(folder, models)
        found = load_scheduler(folder, DISCRETE_SCHEDULERS, EPSILON)
        self.scheduler = found if isinstance(found, LCMScheduler) else as_ddim(found)
        self.process = EpsilonPrediction(self.scheduler.alphas_cumprod)
        width = read_facts(folder / "unet" / "config.json").get("time_cond_proj_dim")
        if width not in self.guidance_widths:
            raise UnusableModel(
                f"{folder}/unet/config.json: time_cond_proj_dim is {width}; expected 256 for an embedded guidance "
                "scale, 512 for one with motion guidance, or null"
            )
        self.told_numbers = self.guidance_widths[width]
        self.tokenizer: Any = load_tokenizer(CLIPTokenizer, folder) if "text_encoder" in models else None

    @classmethod
    def load_part(cls, name: str, folder: Path, device: torch.device | str) -> Any:
        if name == "unet":
            return load_unet(folder, device)
        if name == "vae":
            return load_vae(AutoencoderKL, folder, device)
        return load_component(CLIPTextModel, folder).to(device)

    @torch.no_grad()
    def condition(
        self, images: Tensor, captions: Sequence[str], settings: EncodeSettings, generator: torch.Generator
    ) -> Condition:
        """What the stock pipeline tells the denoiser of captions; images go unread.

        "text" [B, L, D]: the text encoder's last hidden state, padding included; "guidance" [B, 256 or 512], where
        the U-Net was distilled with a guidance scale: `encode.guidance` embedded, and motion guidance 0.
        """
        encoder = self._part("text_encoder")
        tokens, mask = tokenized(self.tokenizer, captions, self.tokenizer.model_max_length, encoder.device)
        seen = mask if getattr(encoder.config, "use_attention_mask", False) else None
        told: Condition = {"text": encoder(tokens, attention_mask=seen).last_hidden_state}
        if self.told_numbers:
            numbers = torch.tensor((settings.guidance, 0.0)[: self.told_numbers])
            embedded = guidance_embedding(numbers).flatten()
            told["guidance"] = embedded.expand(len(captions), -1).to(encoder.device)
        return told

    def stock_shape(self) -> tuple[int, int, int]:
        size = self.denoiser.model.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = self.vae_facts.spatial
        return self.stock_frames, height * pixels, width * pixels

    @torch.no_grad()
    def sample(self, denoiser: Answering, noise: Noise, condition: Condition, steps: int) -> Tensor:
        """LCM where that is the folder's scheduler, DDIM at its timesteps where it is another.

        LCM's answer is x0 itself: its c_skip, below 1e-5 from timestep 20 on, is left out.
        """

        def network(x: Tensor, time: Tensor) -> Tensor:
            return denoiser(x, time, condition)

        self.scheduler.set_timesteps(steps)
        sigmas = self.process.sigmas[self.scheduler.timesteps]
        if isinstance(self.scheduler, LCMScheduler):
            return self.process.sample_consistency(network, noise(0), torch.cat([sigmas, torch.zeros(1)]), noise)
        last = (1 / self.scheduler.final_alpha_cumprod - 1).sqrt()
        return self.process.sample(network, noise(0), torch.cat([sigmas, last[None]]))


class Wan(Pipeline):
    """`WanPipeline`, Wan 2.1: flow matching, and a causal video VAE that compresses time as well.

    A VAE that takes k frames to one latent in time encodes clips of k n + 1 frames.
    """

    folders: ClassVar = {"denoiser": ("transformer",), "vae": ("vae",), "conditioner": ("text_encoder",)}
    files = ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "transformer/config.json")
    conditioned_on = "text"
    process = FlowMatching()
    max_tokens = 512

    def __init__(self, folder: Path, models: dict[str, Any]) -> None:
        super().__init__(folder, models)
        index = read_facts(folder / "model_index.json")
        if index.get("expand_timesteps") or any(index.get("transformer_2") or ()):
            kind = "expand_timesteps" if index.get("expand_timesteps") else "two experts, transformer and transformer_2"
            raise UnusableModel(f"{folder} is a Wan 2.2 model ({kind}), which is not supported yet; Wan 2.1's are")
        self.scheduler = load_scheduler(folder, FLOW_SCHEDULERS, FLOW)
        self.patch = read_facts(folder / "transformer" / "config.json").get("patch_size", (1, 2, 2))
        self.tokenizer: Any = load_tokenizer(AutoTokenizer, folder) if "text_encoder" in models else None

    @classmethod
    def load_part(cls, name: str, folder: Path, device: torch.device | str) -> Any:
        if name == "transformer":
            return load_transformer(folder, device)
        if name == "vae":
            return load_vae(AutoencoderKLWan, folder, device)
        return load_component(UMT5EncoderModel, folder).to(device)

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, T', h, w], the posterior's mode."""
        frames = self.latent_shape(*clips.shape[2:])[1]
        # The VAE drops what is over 4 n + 1 frames; it is causal, so frames added at the end change none before.
        missing = -(clips.shape[2] - 1) % 4
        clips = torch.cat([clips, clips[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2).to(self.vae.device)
        mean, std = latent_statistics(self.vae, self.vae.device)
        return (self.vae.encode(clips).latent_dist.mode()[:, :, :frames] - mean) / std  # type: ignore[no-any-return]

    @torch.no_grad()
    def condition(
        self, images: Tensor, captions: Sequence[str], settings: EncodeSettings, generator: torch.Generator
    ) -> Condition:
        """What the stock pipeline tells the denoiser of captions; images go unread.

        "text" [B, L, D]: the text encoder's last hidden state, zero beyond the caption's end.
        """
        encoder = self._part("text_encoder")
        length = min(self.max_tokens, self.tokenizer.model_max_length)
        tokens, mask = tokenized(self.tokenizer, [prompt_clean(text) for text in captions], length, encoder.device)
        return {"text": encoder(tokens, attention_mask=mask).last_hidden_state * mask[..., None]}

    def latent_shape(self, frames: int, height: int, width: int) -> LatentShape:
        """Also refuses what the transformer would drop of the latents."""
        shape = super().latent_shape(frames, height, width)
        if height % (side := self.vae_facts.spatial * self.patch[-1]) or width % side:
            raise ValueError(f"{height} x {width} pixels do not fit {self.folder}: its sides are multiples of {side}")
        return shape

    def stock_shape(self) -> tuple[int, int, int]:
        return 81, 480, 832

    @torch.no_grad()
    def sample(self, denoiser: Answering, noise: Noise, condition: Condition, steps: int) -> Tensor:
        """Euler steps over the folder's own noise levels, with its shift."""
        self.scheduler.set_timesteps(steps)
        t = self.scheduler.sigmas
        return self.process.sample(lambda x, time: denoiser(x, time, condition), noise(0), t / (1 - t))


def tokenized(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their mask (1 for a token, 0 for padding), both [B, length]; what is over is cut off."""
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found.input_ids.to(device), found.attention_mask.to(device)


def load_tokenizer(cls: Any, folder: Path) -> Any:
    """The pipeline folder's tokenizer/, by a transformers class."""
    place = folder / "tokenizer"
    # Without its files transformers makes a tokenizer that knows no word.
    if not (place / "tokenizer.json").is_file() and not all(
        (place / f).is_file() for f in ("vocab.json", "merges.txt")
    ):
        raise UnusableModel(f"{place} has neither tokenizer.json nor vocab.json with merges.txt; copy the whole folder")
    try:
        return cls.from_pretrained(place, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UnusableModel(f"{place} cannot be loaded as a tokenizer: {error}") from error


def load_scheduler(folder: Path, known: Iterable[type[Any]], only: Mapping[str, Any]) -> Any:
    """The pipeline folder's scheduler/; UnusableModel unless it is of a known class and as `only` says."""
    file = folder / "scheduler" / "scheduler_config.json"
    classes = {cls.__name__: cls for cls in known}
    name = read_facts(file).get("_class_name")
    if name not in classes:
        raise UnusableModel(f"{file} names the class {name!r}; expected one of {', '.join(classes)}")
    scheduler = classes[name].from_pretrained(file.parent, local_files_only=True)
    for key, value in only.items():
        if (found := scheduler.config.get(key, value)) != value:
            raise UnusableModel(f"{file}: {key} is {found!r}, but only {value!r} is supported yet")
    return scheduler


def as_ddim(scheduler: Any) -> DDIMScheduler:
    """DDIM with the noise levels and the spacing of another discrete scheduler."""
    keys = config_of(DDIMScheduler())
    return DDIMScheduler(**{key: value for key, value in config_of(scheduler).items() if key in keys})


def read_facts(file: Path) -> dict[str, Any]:
    """A JSON object of a pipeline folder; UnusableModel where there is none."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UnusableModel(f"{file} cannot be read ({error}); copy the whole pipeline folder") from None
