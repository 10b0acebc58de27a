"""A tiny random transformer of every class in TRANSFORMERS, and what it is told."""

from typing import Any

import torch
from torch import Tensor

from vdmini_core.models.graph import Condition
from vdmini_core.models.transformer import TRANSFORMERS, TransformerDenoiser

TEXT, TOKENS, CHANNELS = 16, 5, 4
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "HunyuanVideoTransformer3DModel": HEADS
    | {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 2, 2),
    },
    "HunyuanVideo15Transformer3DModel": HEADS
    | {
        "in_channels": 2 * CHANNELS + 1,
        "out_channels": CHANNELS,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT,
        "text_embed_2_dim": 12,
        "image_embed_dim": 6,
        "rope_axes_dim": (4, 2, 2),
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 4,
        "rope_max_seq_len": 32,
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 16,
        "text_embed_dim": TEXT,
        "num_layers": 4,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": TOKENS,
        "use_rotary_positional_embeddings": True,
    },
    "LTXVideoTransformer3DModel": HEADS
    | {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "cross_attention_dim": 16,
        "num_layers": 4,
        "caption_channels": TEXT,
    },
    "MochiTransformer3DModel": HEADS
    | {
        "in_channels": CHANNELS,
        "num_layers": 4,
        "pooled_projection_dim": 8,
        "text_embed_dim": TEXT,
        "time_embed_dim": 16,
    },
}


def new_transformer(name: str, **changes: Any) -> TransformerDenoiser:
    """A random model of the class in which every block matters, gates that start at zero included.

    HunyuanVideo has double.0-1 and single.0-2, the others block.0-3. `changes` to the class's config.
    """
    model = TRANSFORMERS[name].stock(**CONFIGS[name] | changes).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * min(1.0, 1.5 / fan_in**0.5))
    return TransformerDenoiser(model)


def new_latents(batch: int = 1, frames: int = 2, size: int = 4, seed: int = 0) -> Tensor:
    """Latents [B, 4, frames, size, size + 2]."""
    return torch.randn(batch, CHANNELS, frames, size, size + 2, generator=torch.Generator().manual_seed(seed))


def new_condition(batch: int = 1, seed: int = 0) -> Condition:
    """Everything that any of the classes is told; text of 5 tokens, the last one padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, TOKENS)
    mask[:, -1] = 0
    return {
        "text": torch.randn(batch, TOKENS, TEXT, generator=generator),
        "text_mask": mask,
        "pooled_text": torch.randn(batch, 8, generator=generator),
        "guidance": torch.full((batch,), 6000.0),
        "text_2": torch.randn(batch, 3, 12, generator=generator),
        "text_2_mask": torch.ones(batch, 3),
        "frame_rate": torch.full((batch,), 25.0),
    }


@torch.no_grad()
def answer_of(denoiser: TransformerDenoiser, batch: int = 1, **shape: int) -> Tensor:
    """What the denoiser answers for fixed latents, time 500 and condition."""
    return denoiser(new_latents(batch, **shape), torch.full((batch,), 500.0), new_condition(batch))
