"""Converts the U-Net of VideoCrafter2 and T2V-Turbo-v2 to diffusers' `UNet3DConditionModel`.

It is the same network but for its embedding (VideoCrafter2, arXiv 2401.09047; T2V-Turbo-v2, arXiv 2410.05677):

    emb = time_embed(sincos(t) + c) + fps_embedding(sincos(fps))
    c = time_cond_proj(w), with motion guidance combine_proj(cat[time_cond_proj(w), motion_cond_proj(m)])

At a fixed frame rate the last term of emb is a constant and goes into a bias; the projections have no
biases and fold into diffusers' one `cond_proj`, which is fed w or cat[w, m] (`guidance_embedding`).
"""

import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import LCMScheduler, UNet3DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from pydantic import Field, ValidationError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu

from vdmini_core.artifacts import Record, file_digest, write_json
from vdmini_core.models.loading import UnusableModel
from vdmini_core.settings import describe

PREFIX = "model.diffusion_model."  # of the U-Net in a whole LVDM checkpoint
SAMPLE_SIZE = (40, 64)  # latents of the public models' 320 x 512 pixels
# The pipeline's other parts, which are not converted: library, class, what it has to be.
COMPANIONS = {
    "vae": ("diffusers", "AutoencoderKL", "Stable Diffusion's image VAE, scaling factor 0.18215"),
    "text_encoder": ("transformers", "CLIPTextModel", "OpenCLIP ViT-H/14 up to its penultimate layer"),
    "tokenizer": ("transformers", "CLIPTokenizer", "the tokenizer of that text encoder"),
}
COMPANIONS_SOURCE = "stabilityai/stable-diffusion-2-1"

ON = "use_linear conv_resample temporal_conv temporal_attention temporal_selfatt_only addition_attention fps_cond"
OFF = (
    "use_relative_position use_causal_attention use_image_attention use_scale_shift_norm resblock_updown "
    "tempspatial_aware"
)
# Arguments of the reference that diffusers' class can do in one way only, and those without effect on the result.
FIXED: dict[str, Any] = {"dims": 2, "transformer_depth": 1, "temporal_transformer_depth": 1}
FIXED |= dict.fromkeys(ON.split(), True) | dict.fromkeys(OFF.split(), False)
IGNORED = {"num_heads", "temporal_length", "dropout", "use_checkpoint", "use_fp16", "record_attn_probs"}


class UNetArguments(Record):
    """Arguments of the reference's `UNetModel`, by default those of the public 320 x 512 model.

    `*_cond_proj_dim` None: whatever the weights have.
    """

    in_channels: int = Field(4, gt=0)
    out_channels: int = Field(4, gt=0)
    model_channels: int = Field(320, gt=0, multiple_of=32)
    channel_mult: tuple[int, ...] = Field((1, 2, 4, 4), min_length=1)
    num_res_blocks: int = Field(2, gt=0)
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    num_head_channels: int = Field(64, gt=0)
    context_dim: int = Field(1024, gt=0)
    time_cond_proj_dim: int | None = Field(None, gt=0)
    motion_cond_proj_dim: int | None = Field(None, gt=0)


class Conversion(Record):
    """conversion.json: where a converted folder comes from; `config` includes the projections found."""

    source: str
    sha256: str
    fps: int
    parameters: int
    config: UNetArguments


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The U-Net's tensors under the reference's own names, memory-mapped where the format allows.

    Reads .safetensors, or what torch.save wrote (.ckpt, .pt), bare or as {"state_dict": ...}; of a whole LVDM
    checkpoint the U-Net only. Anything else, also a pickle of more than plain tensors, raises UnusableModel.
    """
    if not path.is_file():
        raise UnusableModel(f"{path} is no file; expected model.ckpt, unet_mg.pt, unet_no_mg.pt or safetensors")
    content = _load_tensors(path)
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    found = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): value for name, value in found if isinstance(value, Tensor)}
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    weights = weights or tensors
    if lost := [key for key in ("time_embed.0.weight", "input_blocks.0.0.weight") if key not in weights]:
        raise UnusableModel(
            f"{path} holds no VideoCrafter2 U-Net: {' and '.join(lost)} not found, with or without {PREFIX!r}, "
            f"among its {len(tensors)} tensors"
        )
    return weights


def _load_tensors(path: Path) -> Any:
    """What the file holds; torch's own loader runs no code and reads tensors and plain containers only."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnusableModel(
            f"{path} is no pickle of plain tensors; other objects can run code when loaded and are refused: "
            "save its state dict alone, best as safetensors"
        ) from error
    except Exception as error:  # broken bytes raise anything: KeyError, struct.error, SafetensorError, ...
        raise UnusableModel(f"{path} cannot be read ({error!r:.200}); if it is damaged, download it again") from error


def read_arguments(path: Path | None) -> UNetArguments:
    """The reference's U-Net arguments from JSON or YAML; without a file those of the public VideoCrafter2.

    The file is the reference's yaml (`model.params.unet_config.params`), a part of it, or the mapping itself.
    What it leaves out is as in the public model. Raises UnusableModel for what cannot be converted.
    """
    if path is None:
        return UNetArguments()
    try:
        values: Any = yaml.safe_load(path.read_text())  # JSON is YAML
    except OSError as error:
        raise UnusableModel(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnusableModel(f"{path} is neither JSON nor YAML: {error}") from None
    for key in ("model", "params", "unet_config", "params"):
        values = values.get(key, values) if isinstance(values, dict) else values
    if isinstance(values, dict):
        for name, only in FIXED.items():
            if values.get(name, only) != only:
                raise UnusableModel(f"{path}: {name} is {values[name]!r}, but only {only!r} can be converted")
        values = {name: value for name, value in values.items() if name not in FIXED.keys() | IGNORED}
    try:
        return UNetArguments.model_validate(values)
    except ValidationError as error:
        raise UnusableModel(f"{path} describes no U-Net that can be converted: {describe(error)}") from None


def guidance_embedding(scales: Tensor, width: int = 256) -> Tensor:
    """Embed guidance scales w, or motion guidance scales m, [B] -> float32 [B, width] as the U-Net expects them.

    sin, then cos of 1000 w exp(-ln(10000) i / (width / 2 - 1)), as in latent consistency models (arXiv 2310.04378).
    """
    # The reference's order of operations: angles reach 15000, so float32 rounding of the frequencies shows (4e-4).
    step = torch.tensor(10000.0, device=scales.device).log() / (width // 2 - 1)
    frequencies = torch.exp(torch.arange(width // 2, device=scales.device) * -step)
    angles = 1000.0 * scales.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def convert_unet(weights: Mapping[str, Tensor], config: UNetArguments, fps: int) -> UNet3DConditionModel:
    """diffusers' U-Net with the reference's weights, in float32, frozen, for clips of `fps` frames per second.

    `time_cond_proj_dim` is None, 256, or with motion guidance 512 for cat[w, m]. Raises UnusableModel, listing
    keys, unless every key is used, none is missing and every shape is what `config` makes it.
    """
    config = with_projections(config, weights)
    with torch.device("meta"):
        unet = UNet3DConditionModel(**_diffusers_config(config))
    modules, folded = _reference_modules(config), _folded_shapes(config)
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items() if "cond_proj" not in name}
    names = {name: _reference_name(name, modules) for name in shapes}
    # init_attn projects by convolutions over one frame, [out, in, 1].
    weights = {name: value.squeeze(-1) if value.ndim == 3 else value for name, value in weights.items()}
    _check_fit(weights, {names[name]: shape for name, shape in shapes.items()} | folded)

    state = {name: weights[reference].float().contiguous() for name, reference in names.items()}
    old = {name: weights[name].float() for name in folded}
    told = torch.tensor([fps], device=old["fps_embedding.0.bias"].device)
    hidden = get_timestep_embedding(told, config.model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    for layer in (0, 2):
        hidden = linear(hidden, old[f"fps_embedding.{layer}.weight"], old[f"fps_embedding.{layer}.bias"])
        hidden = silu(hidden) if layer == 0 else hidden
    state["time_embedding.linear_2.bias"] = state["time_embedding.linear_2.bias"] + hidden[0]
    if config.motion_cond_proj_dim:
        on_w, on_m = old["combine_proj.weight"].chunk(2, 1)
        state["time_embedding.cond_proj.weight"] = torch.cat(
            [on_w @ old["time_cond_proj.weight"], on_m @ old["motion_cond_proj.weight"]], 1
        )
    elif config.time_cond_proj_dim:
        state["time_embedding.cond_proj.weight"] = old["time_cond_proj.weight"].contiguous()
    unet.load_state_dict(state, assign=True)
    return unet.eval().requires_grad_(False)


def with_projections(config: UNetArguments, weights: Mapping[str, Tensor]) -> UNetArguments:
    """`config` with the widths of the guidance projections in `weights` where it leaves them open."""
    widths = {name: getattr(config, f"{name}_dim") for name in ("time_cond_proj", "motion_cond_proj")}
    for name, width in widths.items():
        if width is None and f"{name}.weight" in weights:
            widths[name] = weights[f"{name}.weight"].shape[-1]
    widths["time_cond_proj"] = widths["time_cond_proj"] or widths["motion_cond_proj"]  # the second needs the first
    return config.model_copy(update={f"{name}_dim": width for name, width in widths.items()})


def _diffusers_config(config: UNetArguments) -> dict[str, Any]:
    """The arguments of `UNet3DConditionModel` that build the same network."""
    attended = [2**stage in config.attention_resolutions for stage in range(len(config.channel_mult))]
    return {
        "sample_size": SAMPLE_SIZE,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": tuple("CrossAttnDownBlock3D" if cross else "DownBlock3D" for cross in attended),
        "up_block_types": tuple("CrossAttnUpBlock3D" if cross else "UpBlock3D" for cross in reversed(attended)),
        "block_out_channels": tuple(config.model_channels * factor for factor in config.channel_mult),
        "layers_per_block": config.num_res_blocks,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.num_head_channels,
        "time_cond_proj_dim": (config.time_cond_proj_dim or 0) + (config.motion_cond_proj_dim or 0) or None,
    }


def _reference_modules(config: UNetArguments) -> dict[str, str]:
    """diffusers' module -> the reference's, whose lists number pairs and samplers through all stages."""
    names = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "transformer_in": "init_attn.0",
    }
    names |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    stages, layers = len(config.channel_mult), config.num_res_blocks
    pairs = [("mid_block", 0, "middle_block.0"), ("mid_block", 1, "middle_block.3")]
    for stage in range(stages):
        first = stage * (layers + 1)
        pairs += [(f"down_blocks.{stage}", i, f"input_blocks.{first + i + 1}.0") for i in range(layers)]
        names[f"down_blocks.{stage}.downsamplers.0.conv"] = f"input_blocks.{first + layers + 1}.0.op"
        pairs += [(f"up_blocks.{stage}", i, f"output_blocks.{first + i}.0") for i in range(layers + 1)]
        last = 3 if 2 ** (stages - 1 - stage) in config.attention_resolutions else 1
        names[f"up_blocks.{stage}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{last}.conv"
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    inside |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    for block, index, resnet in pairs:
        names |= {f"{block}.resnets.{index}.{ours}": f"{resnet}.{theirs}" for ours, theirs in inside.items()}
        names[f"{block}.temp_convs.{index}"] = f"{resnet}.temopral_conv"  # so spelled
        names[f"{block}.attentions.{index}"] = f"{resnet.removesuffix('0')}1"
        names[f"{block}.temp_attentions.{index}"] = f"{resnet.removesuffix('0')}2"
    return names


def _reference_name(name: str, modules: Mapping[str, str]) -> str:
    """The reference's key for diffusers' key `name`: the module is renamed, inside it the names are the same."""
    module, inside = name, ""
    while module not in modules:
        module, _, last = module.rpartition(".")
        inside = f".{last}{inside}"
    return modules[module] + inside


def _folded_shapes(config: UNetArguments) -> dict[str, tuple[int, ...]]:
    """Reference keys that have no counterpart in diffusers' U-Net, with their shapes."""
    width, time, motion = config.model_channels, config.time_cond_proj_dim, config.motion_cond_proj_dim
    shapes: dict[str, tuple[int, ...]] = {f"fps_embedding.{layer}.bias": (4 * width,) for layer in (0, 2)}
    shapes |= {"fps_embedding.0.weight": (4 * width, width), "fps_embedding.2.weight": (4 * width, 4 * width)}
    if time:
        shapes["time_cond_proj.weight"] = (width, time)
    if motion:
        shapes |= {"motion_cond_proj.weight": (width, motion), "combine_proj.weight": (width, 2 * width)}
    return shapes


def _check_fit(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UnusableModel, listing keys, unless `weights` are exactly the tensors of `shapes`."""
    common = sorted(shapes.keys() & weights.keys())
    differing = [name for name in common if tuple(weights[name].shape) != shapes[name]]
    wrong = {
        "missing": sorted(shapes.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - shapes.keys()),
        "of another shape": [f"{n} {list(weights[n].shape)} instead of {list(shapes[n])}" for n in differing],
    }
    if any(wrong.values()):
        shown = "; ".join(f"{len(v)} {k} ({', '.join(v[:5])}{', ...' * (len(v) > 5)})" for k, v in wrong.items() if v)
        raise UnusableModel(f"weights and configuration disagree: {shown}; give the configuration of the training")


def convert_checkpoint(checkpoint: Path, out: Path, config_file: Path | None = None, fps: int = 8) -> Path:
    """Write the diffusers pipeline folder `out`: unet/, scheduler/, model_index.json, conversion.json; whole or absent.

    model_index.json also names the parts in COMPANIONS, which have to be put beside. The U-Net is told `fps`
    frames per second for good. Raises UnusableModel; also where `out` is anything but new or an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UnusableModel(f"{out} exists already; name a new or an empty folder")
    config, weights = read_arguments(config_file), read_checkpoint(checkpoint)
    unet = convert_unet(weights, config, fps)
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    unet.save_pretrained(draft / "unet")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    steps = {"num_train_timesteps": 1000, "original_inference_steps": 200, "timestep_scaling": 10.0}
    LCMScheduler(**betas, **steps, prediction_type="epsilon").save_pretrained(draft / "scheduler")
    index = {"_class_name": "TextToVideoSDPipeline", "_diffusers_version": diffusers.__version__}
    parts = {"scheduler": ["diffusers", "LCMScheduler"], "unet": ["diffusers", "UNet3DConditionModel"]}
    write_json(draft / "model_index.json", index | parts | {name: [*row[:2]] for name, row in COMPANIONS.items()})
    record = Conversion(
        source=checkpoint.name,
        sha256=file_digest(checkpoint),
        fps=fps,
        parameters=unet.num_parameters(),
        config=with_projections(config, weights),
    )
    write_json(draft / "conversion.json", record)
    if out.exists():
        out.rmdir()
    draft.rename(out)
    return out
