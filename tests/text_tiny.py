"""Whole pipeline folders of tiny text-to-video models, in the layout of the published ones."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet3DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, UMT5Config, UMT5EncoderModel

from tests.models.tiny_transformers import TEXT, new_transformer
from vdmini_core.artifacts import write_json
from vdmini_core.data.synthetic import ALL_LABELS, describe_label
from vdmini_core.zoo.tokenizers import write_clip_tokenizer, write_t5_tokenizer

WORDS = sorted({word for label in ALL_LABELS for word in describe_label(label).split()})
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MODELSCOPE = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
FRAMES, SIZE = 5, 16
"""What vdmini.json says: 5 frames of 16 x 16 pixels, latents of 4 x 4."""


def write_text_unet(folder: Path, scheduler: str = "DDIM", guidance: int | None = None) -> Path:
    """A `TextToVideoSDPipeline` folder: 4 pixels to a latent, text [B, 77, 16]; `scheduler` DDIM or LCM."""
    tokens = write_clip_tokenizer(folder / "tokenizer", WORDS)
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        norm_num_groups=8,  # a group of one channel would take the time embedding out again
        time_cond_proj_dim=guidance,
    )
    lively(unet).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.5,
    ).save_pretrained(folder / "vae")
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=TEXT,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    made = LCMScheduler(**BETAS, original_inference_steps=200) if scheduler == "LCM" else DDIMScheduler(**MODELSCOPE)
    made.save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": ["diffusers", type(made).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet3DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return _finish(folder, "TextToVideoSDPipeline", parts)


def write_wan(folder: Path, compressing_time: bool = False) -> Path:
    """A `WanPipeline` folder: 4 pixels to a latent, a frame (or `compressing_time` four) too, text [B, 32, 16]."""
    tokens = write_t5_tokenizer(folder / "tokenizer", WORDS)
    new_transformer("WanTransformer3DModel").model.save_pretrained(folder / "transformer")
    torch.manual_seed(1)
    AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[compressing_time] * 2,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 0.8, 1.2],
        scale_factor_temporal=4 if compressing_time else 1,
        scale_factor_spatial=4,
    ).save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=tokens, d_model=TEXT, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    return _finish(folder, "WanPipeline", parts)


def lively(model: nn.Module) -> nn.Module:
    """The model with weights in which every part matters, the text and what starts at zero included."""
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=min(1.0, 1.5 / fan_in**0.5))
    return model


def _finish(folder: Path, name: str, parts: dict[str, list[str]]) -> Path:
    write_json(folder / "model_index.json", {"_class_name": name, "_diffusers_version": "0.42.1", **parts})
    write_json(folder / "vdmini.json", {"frames": FRAMES, "height": SIZE, "width": SIZE})
    return folder
