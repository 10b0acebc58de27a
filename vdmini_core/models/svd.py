"""Stable Video Diffusion: `UNetSpatioTemporalConditionModel` and the pipeline around it.

The core's layout is [B, C, T, H, W]; diffusers' SVD takes [B, T, C, H, W], permuted here at the edge.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    ModelMixin,  # noqa: F401 (a pipeline that names this module for its U-Net looks its base class up here)
    UNetSpatioTemporalConditionModel,
)
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from vdmini_core.diffusion import edm
from vdmini_core.models.graph import IllegalPlan, Unit, expand
from vdmini_core.models.loading import UnusableModel, load_component

Condition = dict[str, Tensor]


class NoMid(nn.Module):
    """Stands where a U-Net without mid block had one; passes its input on."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


class VDMiniUNet(UNetSpatioTemporalConditionModel):
    """diffusers' U-Net without a mid block, which the stock class always builds; all else is stock."""

    @functools.wraps(UNetSpatioTemporalConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mid_block = NoMid()


class SpatioTemporalUNet:
    """SVD's U-Net as a block graph: units, bypass, removal, taps, and the network call."""

    def __init__(self, model: UNetSpatioTemporalConditionModel) -> None:
        self.model = model
        self.stages = len(model.down_blocks)
        self.units = tuple(self._list_units())

    def __call__(self, scaled: Tensor, c_noise: Tensor, condition: Condition) -> Tensor:
        """Predict v for latents [B, C, T, h, w] already multiplied by c_in; c_noise [B]."""
        image = condition["image_latents"][:, :, None].expand(-1, -1, scaled.shape[2], -1, -1)
        sample = torch.cat([scaled, image.to(scaled.dtype)], 1).transpose(1, 2)
        output = self.model(
            sample, c_noise, condition["image_embedding"], condition["added_time_ids"], return_dict=False
        )[0]
        return output.transpose(1, 2)  # type: ignore[no-any-return]

    def _list_units(self) -> Iterator[Unit]:
        deepest = self.stages - 1
        for stage, block in enumerate(self.model.down_blocks):
            yield from _pairs(block, f"D.{stage}", stage, f"down_blocks.{stage}")
        if not isinstance(self.model.mid_block, NoMid):
            mid = self.model.mid_block
            parts = ["mid_block.resnets.0"]
            for index in range(len(mid.attentions)):
                parts += [f"mid_block.attentions.{index}", f"mid_block.resnets.{index + 1}"]
            yield Unit("M", "M", self.stages, tuple(parts))
        for stage, block in enumerate(self.model.up_blocks):
            yield from _pairs(block, f"U.{stage}", deepest - stage, f"up_blocks.{stage}")

    @property
    def blocks(self) -> tuple[str, ...]:
        """Block names, D.0 ... M ... U.3."""
        return tuple(dict.fromkeys(unit.block for unit in self.units))

    def tap_modules(self) -> dict[str, nn.Module]:
        """For every unit the module whose output is its feature (frames folded into the batch)."""
        return {unit.name: self.model.get_submodule(unit.modules[-1]) for unit in self.units}

    def encoder_stages(self) -> list[nn.Module]:
        """The down blocks, outermost first; their outputs feed the discriminator heads."""
        return list(self.model.down_blocks)

    def encoder_widths(self) -> list[int]:
        """Channels of the encoder stages' outputs."""
        return [int(width) for width in self.model.config.block_out_channels]

    def stop_after_encoder(self) -> nn.Module:
        """The module that runs right after the encoder."""
        return self.model.mid_block  # type: ignore[no-any-return]

    @contextmanager
    def bypass(self, names: Iterable[str]) -> Iterator[None]:
        """Within the context the named units (or whole blocks) do nothing.

        A ResBlock passes its hidden state on, through its own 1 x 1 shortcut where the width changes;
        an up pair whose width stays drops its skip, as physical removal would. Attention becomes
        the identity. Where a whole inner stage is bypassed with the mid block, its samplers are too.
        """
        chosen = set(expand(names, self.units))
        with ExitStack() as stack:
            for unit in self.units:
                if unit.name in chosen:
                    for path in unit.modules:
                        module = self.model.get_submodule(path)
                        if ".resnets." in path:
                            stack.enter_context(_passing_on(module, _shortcut(module, self._hidden_width(unit))))
                        else:
                            stack.enter_context(_passing_on(module, _first_argument_in_tuple))
            for stage in self._inner_stages(chosen):
                for block in (self.model.down_blocks[stage - 1], self.model.up_blocks[self.stages - 1 - stage]):
                    sampler = (block.downsamplers if hasattr(block, "downsamplers") else block.upsamplers)[0]
                    stack.enter_context(_passing_on(sampler, _first_argument))
            yield

    def _hidden_width(self, unit: Unit) -> int:
        """Channels of the hidden state (without a skip) that reaches the unit's ResBlock."""
        widths = self.model.config.block_out_channels
        if unit.block == "M":
            return int(widths[-1])
        side, stage, index = unit.name.split(".")
        if side == "D":
            first = self.model.down_blocks[int(stage)].resnets[int(index)]
            return int(first.spatial_res_block.in_channels)
        outward = list(reversed(widths))
        return int(outward[int(stage)] if int(index) > 0 else outward[max(int(stage) - 1, 0)])

    def _inner_stages(self, removed: set[str]) -> list[int]:
        """Stages, deepest first, that go as a whole: every pair of theirs and everything deeper."""
        gone: list[int] = []
        if any(unit.block == "M" and unit.name not in removed for unit in self.units):
            return gone
        for stage in range(self.stages - 1, 0, -1):
            own = [u.name for u in self.units if u.block in (f"D.{stage}", f"U.{self.stages - 1 - stage}")]
            if not set(own) <= removed:
                break
            gone.append(stage)
        return gone

    def without(self, names: Iterable[str]) -> "SpatioTemporalUNet":
        """A new, smaller network with inherited weights; raises IllegalPlan where none exists.

        The new network's units are numbered anew; `surviving` gives the correspondence.
        """
        removed = set(expand(names, self.units))
        config, cls = self._config_without(removed)
        inherited = self._inherited(removed, without_mid=cls is VDMiniUNet)
        with torch.device("meta"):
            skeleton = cls(**config)
        self._check_shapes(skeleton, inherited, removed)
        device, weights = next(self.model.parameters()).device, self.model.state_dict()
        with torch.device(device):
            student = cls(**config).to(device)
        student.load_state_dict({new: weights[old] for new, old in inherited.items()})
        return SpatioTemporalUNet(student.eval().requires_grad_(False))

    def surviving(self, names: Iterable[str]) -> dict[str, str]:
        """Teacher unit -> student unit for every unit kept when `names` are removed."""
        removed = set(expand(names, self.units))
        renames = self._renames(removed)
        return {
            unit.name: _unit_name_at(renames[unit.modules[0]]) if unit.block != "M" else "M"
            for unit in self.units
            if unit.name not in removed
        }

    def _config_without(self, removed: set[str]) -> tuple[dict[str, Any], type[UNetSpatioTemporalConditionModel]]:
        config = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}
        gone = self._inner_stages(removed)
        stages = self.stages - len(gone)
        layers = []
        for stage in range(stages):
            down, up = f"D.{stage}", f"U.{self.stages - 1 - stage}"
            kept = {
                name: [u.name for u in self.units if u.block == name and u.name not in removed] for name in (down, up)
            }
            if len(kept[up]) != len(kept[down]) + 1:
                raise IllegalPlan(
                    f"removing {', '.join(sorted(removed))} leaves {down} {len(kept[down])} pairs and {up} "
                    f"{len(kept[up])}; an up block needs one pair more than its down block, because every "
                    f"skip connection that is made is used: remove pairs of {down} and {up} together"
                )
            widths = config["block_out_channels"]
            if not kept[down] and stage > 0 and widths[stage] != widths[stage - 1]:
                raise IllegalPlan(
                    f"removing {', '.join(sorted(removed))} leaves {down} no pair, and nothing else changes the width "
                    f"{widths[stage - 1]} -> {widths[stage]}; keep {down}.0"
                )
            self._check_skips(stage, removed)
            layers.append(len(kept[down]))
        for key in (
            "block_out_channels",
            "num_attention_heads",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "down_block_types",
        ):
            if isinstance(config[key], (list, tuple)):
                config[key] = tuple(config[key])[:stages]
        config["up_block_types"] = tuple(config["up_block_types"])[len(gone) :]
        config["layers_per_block"] = tuple(layers)
        without_mid = not any(unit.name == "M" and unit.name not in removed for unit in self.units)
        return config, VDMiniUNet if without_mid else UNetSpatioTemporalConditionModel

    def _check_skips(self, stage: int, removed: set[str]) -> None:
        """Raise where removal would hand a kept up pair another skip than the one it was trained on.

        Up pair j of n reads the output of down pair n - 2 - j of its stage, the last one what enters the
        stage; a removed down pair passes on what it receives. Only so is removal the same as bypass.
        """
        down, up = f"D.{stage}", f"U.{self.stages - 1 - stage}"
        downs = [unit.name for unit in self.units if unit.block == down]
        ups = [unit.name for unit in self.units if unit.block == up]
        kept = [index for index, name in enumerate(downs) if name not in removed]

        def fits(kept_ups: Iterable[str]) -> bool:
            read = [len(downs) - 1 - ups.index(name) for name in kept_ups]
            return [max((k for k in kept if k <= r), default=None) for r in read] == [*reversed(kept), None]

        if not fits(name for name in ups if name not in removed):
            choices = itertools.combinations(ups, len(kept) + 1)
            fitting = [[name for name in ups if name not in choice] for choice in choices if fits(choice)]
            raise IllegalPlan(
                f"removing {', '.join(sorted(removed & {*downs, *ups}))} hands pairs of {up} other skip connections "
                f"than they were trained on; of {up} remove {' or '.join('+'.join(names) for names in fitting)} instead"
            )

    def _renames(self, removed: set[str]) -> dict[str, str]:
        """Old module path -> new module path for every numbered part that survives."""
        gone = len(self._inner_stages(removed))
        renames: dict[str, str] = {}
        counters: dict[str, int] = {}
        for unit in self.units:
            if unit.name in removed or unit.block == "M":
                continue
            side, old_stage = unit.block.split(".")
            stage = int(old_stage) - (gone if side == "U" else 0)
            prefix = f"{'down' if side == 'D' else 'up'}_blocks.{stage}"
            position = counters.get(unit.block, 0)
            counters[unit.block] = position + 1
            for path in unit.modules:
                renames[path] = f"{prefix}.{path.split('.')[2]}.{position}"
        for stage in range(self.stages - gone - 1):
            renames[f"down_blocks.{stage}.downsamplers"] = f"down_blocks.{stage}.downsamplers"
        for stage in range(gone, self.stages - 1):
            renames[f"up_blocks.{stage}.upsamplers"] = f"up_blocks.{stage - gone}.upsamplers"
        return renames

    def _inherited(self, removed: set[str], *, without_mid: bool) -> dict[str, str]:
        """New parameter name -> old parameter name."""
        renames = self._renames(removed)
        result = {}
        for old in self.model.state_dict():
            if not old.startswith(("down_blocks.", "up_blocks.", "mid_block.")):
                result[old] = old
            elif old.startswith("mid_block."):
                if not without_mid:
                    result[old] = old
            else:
                parts = old.split(".")
                path = next((p for p in (".".join(parts[:4]), ".".join(parts[:3])) if p in renames), None)
                if path is not None:
                    result[renames[path] + old[len(path) :]] = old
        return result

    def _check_shapes(self, skeleton: nn.Module, inherited: dict[str, str], removed: set[str]) -> None:
        weights = self.model.state_dict()
        for name, expected in skeleton.state_dict().items():
            if name not in inherited:
                raise IllegalPlan(f"removing {', '.join(sorted(removed))} leaves no weights for {name}")
            found = weights[inherited[name]]
            if found.shape != expected.shape:
                part = _unit_name_at(inherited[name])
                raise IllegalPlan(
                    f"removing {', '.join(sorted(removed))} changes what {part} receives: {name} would be "
                    f"{list(expected.shape)}, its weights are {list(found.shape)}; remove a pair that keeps the "
                    f"width instead (the second of a down block, the middle of an up block)"
                )


class SVD:
    """An SVD pipeline folder as the core uses it: denoiser, VAE, image conditions, sampler.

    Parts that were not asked for at loading are None; training needs the denoiser alone.
    """

    parts = ("unet", "vae", "image_encoder")

    def __init__(
        self,
        folder: Path,
        denoiser: SpatioTemporalUNet | None,
        vae: AutoencoderKLTemporalDecoder | None,
        image_encoder: CLIPVisionModelWithProjection | None,
    ) -> None:
        self.folder = folder
        self._denoiser, self._vae, self._image_encoder = denoiser, vae, image_encoder
        self.scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        config = self.scheduler.config
        if (config.prediction_type, config.timestep_type) != ("v_prediction", "continuous"):
            raise UnusableModel(
                f"{folder}/scheduler uses {config.prediction_type} and {config.timestep_type} timesteps; SVD's "
                "preconditioning needs v_prediction and continuous"
            )

    @classmethod
    def load(cls, folder: Path, parts: Iterable[str] = parts, device: torch.device | str = "cpu") -> "SVD":
        """Load the named parts of a diffusers pipeline folder in float32."""
        wanted = set(parts)
        unet = load_unet(folder / "unet", device) if "unet" in wanted else None
        vae, image_encoder = (
            load_component(kind, folder / name).to(device) if name in wanted else None
            for name, kind in (("vae", AutoencoderKLTemporalDecoder), ("image_encoder", CLIPVisionModelWithProjection))
        )
        return cls(folder, unet, vae, image_encoder)

    @property
    def denoiser(self) -> SpatioTemporalUNet:
        assert self._denoiser is not None, "loaded without the unet"
        return self._denoiser

    @property
    def vae(self) -> AutoencoderKLTemporalDecoder:
        assert self._vae is not None, "loaded without the vae"
        return self._vae

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of every loaded part."""
        unet = None if self._denoiser is None else self._denoiser.model
        found = {"unet": unet, "vae": self._vae, "image_encoder": self._image_encoder}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in found.items() if part is not None}

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Tensor:
        """Clips [B, 3, T, H, W] in [-1, 1] -> scaled latents [B, C, T, h, w], the posterior's mode."""
        frames = clips.transpose(1, 2)
        latents: Tensor = self.vae.encode(frames.flatten(0, 1).to(self.vae.device)).latent_dist.mode()
        return (latents * self.vae.config.scaling_factor).unflatten(0, frames.shape[:2]).transpose(1, 2)  # type: ignore[no-any-return]

    @torch.no_grad()
    def condition(
        self, images: Tensor, *, fps: int, motion_bucket_id: int, noise_augmentation: float, generator: torch.Generator
    ) -> Condition:
        """What the denoiser is told of first frames [B, 3, H, W] in [-1, 1], as the stock pipeline does.

        Image latents are the VAE's mode of the noise-augmented frame and are *not* scaled; the model
        is told fps - 1.
        """
        assert self._image_encoder is not None, "loaded without the image_encoder"
        noise = torch.randn(images.shape, generator=generator)
        noisy = (images + noise_augmentation * noise).to(self.vae.device)
        processor = CLIPImageProcessor.from_pretrained(self.folder / "feature_extractor")
        pixels = processor(
            images=(_resize_with_antialiasing(images, (224, 224)) + 1) / 2,
            do_normalize=True,
            do_center_crop=False,
            do_resize=False,
            do_rescale=False,
            return_tensors="pt",
        ).pixel_values
        ids = torch.tensor([[fps - 1.0, float(motion_bucket_id), noise_augmentation]])
        return {
            "image_latents": self.vae.encode(noisy).latent_dist.mode(),
            "image_embedding": self._image_encoder(pixels.to(self._image_encoder.device)).image_embeds[:, None],
            "added_time_ids": ids.expand(len(images), -1).to(self.vae.device),
        }

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, T, h, w] -> clips [B, 3, T, H, W] in [-1, 1], clip by clip."""
        clips = []
        for clip in latents:
            frames = (clip / self.vae.config.scaling_factor).transpose(0, 1)
            clips.append(self.vae.decode(frames, num_frames=len(frames)).sample.transpose(0, 1))
        return torch.stack(clips).float().clamp(-1, 1)

    @torch.no_grad()
    def sample(self, denoiser: SpatioTemporalUNet, noise: Tensor, condition: Condition, steps: int) -> Tensor:
        """Latents from standard normal noise [B, C, T, h, w] with the folder's own noise levels; no CFG."""
        self.scheduler.set_timesteps(steps)
        return edm.sample_euler(
            lambda x, level: denoiser(x, level, condition),
            noise,
            self.scheduler.sigmas,
            float(self.scheduler.init_noise_sigma),
        )


def load_unet(folder: Path, device: torch.device | str = "cpu") -> SpatioTemporalUNet:
    """Load a stock U-Net or a student's, whichever its config names."""
    path = folder / "config.json"
    try:
        name = json.loads(path.read_text())["_class_name"] if path.is_file() else "UNetSpatioTemporalConditionModel"
    except (ValueError, KeyError) as error:
        raise UnusableModel(f"{path} is no config of a diffusers model ({error!r}); copy the whole folder") from None
    classes = {cls.__name__: cls for cls in (UNetSpatioTemporalConditionModel, VDMiniUNet)}
    if name not in classes:
        raise UnusableModel(f"{path} names the class {name!r}; expected one of {', '.join(classes)}")
    return SpatioTemporalUNet(load_component(classes[name], folder).to(device))


def _pairs(block: nn.Module, name: str, depth: int, path: str) -> Iterator[Unit]:
    attentions = getattr(block, "attentions", ())
    for index in range(len(block.resnets)):  # type: ignore[arg-type]
        modules = [f"{path}.resnets.{index}"]
        if index < len(attentions):
            modules.append(f"{path}.attentions.{index}")
        yield Unit(f"{name}.{index}", name, depth, tuple(modules))


def _unit_name_at(path: str) -> str:
    """`up_blocks.1.attentions.2...` -> `U.1.2`."""
    parts = path.split(".")
    if parts[0] not in ("down_blocks", "up_blocks") or len(parts) < 4:
        return path
    return f"{'D' if parts[0] == 'down_blocks' else 'U'}.{parts[1]}.{parts[3]}"


@contextmanager
def _passing_on(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context `module(...)` answers `forward(...)`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _first_argument(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _first_argument_in_tuple(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    return (hidden_states,)


def _shortcut(resnet: nn.Module, hidden_width: int) -> Callable[..., Tensor]:
    """What a ResBlock without its residual branch passes on.

    The hidden part of its input, if its width is the block's own; else its 1 x 1 shortcut of all of it.
    """
    spatial: Any = resnet.spatial_res_block

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if hidden_width == spatial.out_channels:
            return hidden_states[:, :hidden_width]
        return spatial.conv_shortcut(hidden_states)  # type: ignore[no-any-return]

    return forward
