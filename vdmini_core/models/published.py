"""Denoisers from their config alone, on the meta device: what a model is, without its weights.

A config is a denoiser's config.json. Those in configs/ say in addition, under keys that diffusers never passes on:
- `_sources`: the hub ids, or the folder of a recipe, whose denoiser this is;
- `_pipeline`: the diffusers pipeline around it, with what sets this one apart from others of the class;
- `_shape`: frames, height and width in pixels of the clips it was made for;
- `_vae`: its VAE's compression, see VAEFacts;
- `_reference_parameters`: of the original file, where a conversion folds some of them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vdmini_core.models.graph import Condition, Denoiser, empty
from vdmini_core.models.loading import UnusableModel
from vdmini_core.models.pipeline import ClipShape
from vdmini_core.models.sources import HUB_ID, ZOO, resolve_source
from vdmini_core.models.transformer import TRANSFORMERS, TransformerDenoiser, patch_size
from vdmini_core.models.unet import UNET_CLASSES, UNetDenoiser
from vdmini_core.models.vae_facts import LatentShape, VAEFacts, vae_facts

FOLDER = Path(__file__).parent / "configs"
DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Blueprint:
    """A denoiser's config, named by where it was read, and what is known of the model around it (None: nothing)."""

    name: str
    config: Mapping[str, Any]
    vae: VAEFacts | None = None
    latents: LatentShape | None = None
    pipeline: str | None = None
    reference_parameters: int | None = None

    def build(self) -> Denoiser:
        """The denoiser on the meta device; UnusableModel for a class that is not supported."""
        name, config = str(self.config.get("_class_name")), {k: v for k, v in self.config.items() if k[0] != "_"}
        if name in UNET_CLASSES:
            return UNetDenoiser(empty(UNET_CLASSES[name], config).to("meta").eval())
        if name in TRANSFORMERS:
            return TransformerDenoiser(empty(TRANSFORMERS[name].stock, config).to("meta").eval())
        known = ", ".join((*UNET_CLASSES, *TRANSFORMERS))
        raise UnusableModel(f"{self.name} names the class {name!r}; expected one of {known}")


def published_names() -> list[str]:
    """The models whose configs ship with VDMini."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def published(name: str) -> Denoiser:
    """A published model (configs/<name>.json) without weights, on the meta device, for counting."""
    return _packaged(name).build()


def blueprint(source: str) -> Blueprint:
    """What `zoo:<name>`, a pipeline's or denoiser's folder, a published name or a hub id describes.

    Reads config files only; the hub is asked for ids that no packaged config names. Raises UnusableModel.
    """
    if source.startswith("zoo:") or Path(source).expanduser().is_dir():
        folder = resolve_source(source)
        return _from_files(source, lambda path: _read(folder / path))
    for name in published_names():
        found = _packaged(name)
        if source == name or source in found.config["_sources"]:
            return found
    if HUB_ID.match(source) and not source.startswith("."):
        return _from_files(source, lambda path: _fetch(source, path))
    raise UnusableModel(
        f"{source!r} is no folder, no hub id (owner/name) and no model whose config ships with VDMini; these are "
        f"{', '.join(published_names())}, {', '.join(f'zoo:{p.parent.name}' for p in ZOO.glob('*/model_index.json'))}"
    )


def _packaged(name: str) -> Blueprint:
    if name not in published_names():
        raise UnusableModel(f"there is no config of {name!r}; expected one of {', '.join(published_names())}")
    config = json.loads((FOLDER / f"{name}.json").read_text())
    vae = VAEFacts.model_validate(config["_vae"])
    latents, reference = vae.latent_shape(*config["_shape"]), config.get("_reference_parameters")
    return Blueprint(name, config, vae, latents, config["_pipeline"], reference)


def _from_files(source: str, read: Callable[[str], dict[str, Any] | None]) -> Blueprint:
    """The blueprint of a pipeline, or of a denoiser alone, whose files `read` gives; None where there is none."""
    paths = [*(f"{part}/config.json" for part in DENOISERS), "config.json"]
    config = next((found for path in paths if (found := read(path))), None)
    if config is None:
        raise UnusableModel(f"{source} has none of {', '.join(paths)}; expected a diffusers pipeline or denoiser")
    vae = vae_facts(read("vae/config.json") or {})
    latents, pipeline = own_latents(config), (read("model_index.json") or {}).get("_class_name")
    if vae and (made_for := read("vdmini.json")):
        shape = ClipShape.model_validate(made_for)
        latents = vae.latent_shape(shape.frames, shape.height, shape.width)
    return Blueprint(source, config, vae, latents, pipeline)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return {**json.loads(path.read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise UnusableModel(f"{path} is no config ({error}); copy the folder again") from None


def _fetch(source: str, path: str) -> dict[str, Any] | None:
    """One file of a hub repository's newest revision, or None where it has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _read(Path(hf_hub_download(source, path)))
    except LocalEntryNotFoundError as error:  # is an EntryNotFoundError, but says that the hub was not reached
        reason = str(error)
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error)
    reason = re.split(r"(?<=[.:])\s", reason.strip())[0]
    raise UnusableModel(
        f"{path} of {source} cannot be fetched from the hub ({reason}); name a local folder, or one of "
        f"{', '.join(published_names())}, which need no network"
    )


def own_latents(config: Mapping[str, Any]) -> LatentShape | None:
    """The latents that a config.json itself says the denoiser is for, or None: only SVD's and CogVideoX's do."""
    side = config.get("sample_size")
    if config.get("num_frames") and side:
        height, width = (side, side) if isinstance(side, int) else side
        return config["out_channels"], config["num_frames"], height, width
    if config.get("sample_frames"):
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        return config["out_channels"], frames, config["sample_height"], config["sample_width"]
    return None


Sizes = dict[str, tuple[int, ...]]


def _svd_told(config: Any, height: int, width: int) -> Sizes:
    ids = config.projection_class_embeddings_input_dim // config.addition_time_embed_dim
    return {
        "image_latents": (config.in_channels - config.out_channels, height, width),
        "image_embedding": (1, config.cross_attention_dim),
        "added_time_ids": (ids,),
    }


def _text_told(config: Any, height: int, width: int) -> Sizes:
    guidance: Sizes = {"guidance": (config.time_cond_proj_dim,)} if config.time_cond_proj_dim else {}
    return {"text": (77, config.cross_attention_dim), **guidance}


def _hunyuan_told(config: Any, height: int, width: int) -> Sizes:
    return {"pooled_text": (config.pooled_projection_dim,), "guidance": ()} | masked(256, config.text_embed_dim)


def _hunyuan15_told(config: Any, height: int, width: int) -> Sizes:
    return masked(1000, config.text_embed_dim) | {"text_2": (256, config.text_embed_2_dim), "text_2_mask": (256,)}


def masked(tokens: int, width: int) -> Sizes:
    """A text and its mask."""
    return {"text": (tokens, width), "text_mask": (tokens,)}


TOLD: dict[str, Callable[[Any, int, int], Sizes]] = {
    "UNetSpatioTemporalConditionModel": _svd_told,
    "UNet3DConditionModel": _text_told,
    "UNetMotionModel": _text_told,
    "HunyuanVideoTransformer3DModel": _hunyuan_told,
    "HunyuanVideo15Transformer3DModel": _hunyuan15_told,
    "WanTransformer3DModel": lambda config, *_: {"text": (512, config.text_dim)},
    "CogVideoXTransformer3DModel": lambda config, *_: {"text": (config.max_text_seq_length, config.text_embed_dim)},
    "LTXVideoTransformer3DModel": lambda config, *_: masked(128, config.caption_channels) | {"frame_rate": ()},
    "MochiTransformer3DModel": lambda config, *_: masked(256, config.text_embed_dim),
}
"""Stock class -> the shape of each of its conditions without the batch, given config and latents' height and width.

Texts are as long as the stock pipeline pads them.
"""


def meta_inputs(denoiser: Denoiser, shape: LatentShape, batch: int = 1) -> tuple[torch.Tensor, Condition]:
    """Latents [B, C, T, h, w] and a condition for the denoiser, on the meta device.

    ValueError where the latents do not divide into the patches that a transformer reads.
    """
    model = denoiser.model
    if isinstance(denoiser, TransformerDenoiser):
        patch = patch_size(model)
        if any(size % length for size, length in zip(shape[1:], patch, strict=True)):
            got, wanted = (" x ".join(map(str, sides)) for sides in (shape[1:], patch))
            raise ValueError(
                f"latents of {got} are no multiples of the patches of {wanted}; change data.size or frames"
            )
    told = next(told for cls in type(model).__mro__ if (told := TOLD.get(cls.__name__)))
    shapes = told(model.config, *shape[2:])
    condition = {name: torch.zeros(batch, *size, device="meta") for name, size in shapes.items()}
    return torch.zeros(batch, *shape, device="meta"), condition
