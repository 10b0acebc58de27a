"""The zoo's untrained text-to-video networks, their text encoders, and the fixed parts of their pipeline folders.

A small Wan with UMT5, and a small U-Net in the layout of ModelScope and VideoCrafter2 with CLIP; both know the
captions' words.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, UNet3DConditionModel, WanTransformer3DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, UMT5Config, UMT5EncoderModel

from vdmini_core.artifacts import write_json
from vdmini_core.data.synthetic import ALL_LABELS, describe_label
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.distributed import State
from vdmini_core.zoo.labels import train_labels
from vdmini_core.zoo.tokenizers import write_clip_tokenizer, write_t5_tokenizer
from vdmini_core.zoo.vae import CAUSAL_CHANNELS, FRAME_CHANNELS

TEXT_WIDTH = 64
CAPTIONS = tuple(describe_label(label) for label in ALL_LABELS)
WORDS = sorted({word for text in CAPTIONS for word in text.split()})
CAPTION_TOKENS = 16
"""Of the CLIP tokenizer: 7 for a caption, and room for words that are spelled."""
SOLVER_STEPS = 8
"""DDIM steps that the consistency model was distilled from; with 16 the base is no better."""


def new_transformer() -> WanTransformer3DModel:
    """Eight blocks of width 160 over patches of 4 x 4 latents: 9 x 4 x 4 tokens for 9 frames of 64 x 64.

    The network starts by answering nearly its own input.
    """
    transformer = WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=CAUSAL_CHANNELS,
        out_channels=CAUSAL_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=480,
        num_layers=8,
        rope_max_seq_len=64,
    )
    _pass_patches(transformer)
    return transformer


@torch.no_grad()
def _pass_patches(transformer: WanTransformer3DModel, constant: float = 4.0) -> None:
    """Lead each patch through the residual stream to the output, next to constants that the last norm divides by.

    At high noise the input is the answer but for the clip, as `_answer_input` has it of the U-Net: after 3,200 clips
    the loss above sigma 4 is 1.44, and 1.72 from the class's own start.
    """
    numbers = transformer.patch_embedding.weight[0].numel()
    steady = numbers // 4
    width = len(transformer.patch_embedding.weight)
    transformer.patch_embedding.weight[: numbers + steady] = 0
    transformer.patch_embedding.weight[:numbers].flatten(1).fill_diagonal_(1)
    transformer.patch_embedding.bias[:numbers] = 0
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(steady // 2)
    transformer.patch_embedding.bias[numbers : numbers + steady] = constant * signs
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    # The embedding reads a patch channel by channel, the output has its places first.
    places = numbers // CAUSAL_CHANNELS
    order = torch.arange(numbers).view(CAUSAL_CHANNELS, places).T.flatten()
    spread = ((numbers + steady * constant**2) / width) ** 0.5
    transformer.proj_out.weight[torch.arange(numbers), order] = spread


def new_text_unet() -> UNet3DConditionModel:
    """Four stages in VideoCrafter2's layout, with an embedded guidance scale; 8 x 8 latents, 8 frames.

    Every attention starts as the identity, as the class's temporal convolutions do, the guidance scale starts
    without effect, and the network starts by answering its own input.
    """
    unet = UNet3DConditionModel(
        sample_size=8,
        in_channels=FRAME_CHANNELS,
        out_channels=FRAME_CHANNELS,
        block_out_channels=(48, 48, 48, 48),
        norm_num_groups=12,  # a group of one channel would take the time embedding out again
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        time_cond_proj_dim=256,
    )
    for name, module in unet.named_modules():
        if name.endswith("proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    _answer_input(unet)
    return unet


@torch.no_grad()
def _answer_input(unet: UNet3DConditionModel, constant: float = 3.0) -> None:
    """Lead the input x past all blocks, by the outermost skip connection, to the output.

    At high noise x is the noise but for x0 / sigma, and all that is to be learned is this small difference; a
    network that has to learn x first has colours last. The last norm divides each group of its four channels x,
    -x, K, -K by sqrt((1 + K^2) / 2), almost whatever x is; silu(x) - silu(-x) = x undoes the activation.
    """
    taken, last = 4 * FRAME_CHANNELS, unet.up_blocks[-1].resnets[-1]
    for part in (unet.conv_in, last.conv2, last.conv_shortcut):
        part.weight[:taken] = 0
        part.bias[:taken] = 0
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    signs = torch.tensor([1.0, -1.0])
    for channel in range(FRAME_CHANNELS):
        first = 4 * channel
        unet.conv_in.weight[first : first + 2, channel, 1, 1] = signs
        unet.conv_in.bias[first + 2 : first + 4] = constant * signs
        unet.conv_out.weight[channel, first : first + 2, 1, 1] = signs
    skip = last.in_channels - unet.conv_in.out_channels
    last.conv_shortcut.weight[:taken, skip : skip + taken, 0, 0] = torch.eye(taken)
    unet.conv_norm_out.weight[:taken] = ((1 + constant**2) / 2) ** 0.5


def write_umt5(folder: Path, settings: LoopSettings, device: torch.device, log: Log, track: Track) -> None:
    """The tokenizer and the trained text encoder of a Wan folder."""
    size = write_t5_tokenizer(folder / "tokenizer", WORDS)
    torch.manual_seed(settings.seed)
    config = UMT5Config(
        vocab_size=size, d_model=TEXT_WIDTH, d_kv=32, d_ff=128, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    encoder = UMT5EncoderModel(config)
    train_text_encoder(encoder, AutoTokenizer.from_pretrained(folder / "tokenizer"), settings, device, log, track)
    encoder.half().save_pretrained(folder / "text_encoder")


def write_clip(folder: Path, settings: LoopSettings, device: torch.device, log: Log, track: Track) -> None:
    """The tokenizer and the trained text encoder of a `TextToVideoSDPipeline` folder."""
    size = write_clip_tokenizer(folder / "tokenizer", WORDS, CAPTION_TOKENS)
    torch.manual_seed(settings.seed)
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CAPTION_TOKENS,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    encoder = CLIPTextModel(config)
    train_text_encoder(encoder, CLIPTokenizer.from_pretrained(folder / "tokenizer"), settings, device, log, track)
    encoder.half().save_pretrained(folder / "text_encoder")


def train_text_encoder(
    encoder: CLIPTextModel | UMT5EncoderModel,
    tokenizer: Any,
    settings: LoopSettings,
    device: torch.device,
    log: Log = silent_log,
    track: Track = silent_track,
) -> None:
    """Name shape, colour and motion from the mean of a caption's embeddings, in place."""
    tokens = tokenizer(list(CAPTIONS), padding=True, return_tensors="pt")
    labels = torch.tensor([(label.shape, label.colour, label.motion) for label in ALL_LABELS])

    def chosen_tokens(chosen: Tensor, generator: torch.Generator) -> State:
        return {"tokens": tokens.input_ids[chosen], "mask": tokens.attention_mask[chosen]}

    def mean(state: State) -> Tensor:
        mask = state["mask"]
        hidden = encoder(state["tokens"], attention_mask=mask).last_hidden_state * mask[..., None]
        return hidden.sum(1) / mask.sum(1, keepdim=True)  # type: ignore[no-any-return]

    train_labels(encoder, mean, TEXT_WIDTH, chosen_tokens, labels, settings, device, log, track)


def write_wan_parts(folder: Path, frames: int, size: int) -> None:
    """Scheduler, index and the shape that the model was made for, in the layout of a Wan pipeline folder."""
    parts = {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    _write_parts(folder, "WanPipeline", FlowMatchEulerDiscreteScheduler(shift=1.0), parts, frames, size)


def write_lcm_parts(folder: Path, frames: int, size: int) -> None:
    """The same for the U-Net: Stable Diffusion's noise levels, sampled as LCM samples them (arXiv 2310.04378)."""
    scheduler = LCMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        original_inference_steps=SOLVER_STEPS,
    )
    parts = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet3DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_parts(folder, "TextToVideoSDPipeline", scheduler, parts, frames, size)


def _write_parts(
    folder: Path, pipeline: str, scheduler: Any, parts: dict[str, list[str]], frames: int, size: int
) -> None:
    scheduler.save_pretrained(folder / "scheduler")
    parts = {"scheduler": ["diffusers", type(scheduler).__name__], **parts}
    write_json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.42.1", **parts})
    write_json(folder / "vdmini.json", {"frames": frames, "height": size, "width": size})
