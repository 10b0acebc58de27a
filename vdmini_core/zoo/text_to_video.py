"""The zoo's text-to-video transformer: a small Wan, with UMT5 and a tokenizer that knows the captions' words."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from vdmini_core.artifacts import write_json
from vdmini_core.data.synthetic import ALL_LABELS, COLOURS, MOTIONS, SHAPES, describe_label
from vdmini_core.reporting import Log, Track, silent_log, silent_track
from vdmini_core.settings import LoopSettings
from vdmini_core.training.loop import Player, State, train
from vdmini_core.zoo.tokenizers import write_t5_tokenizer
from vdmini_core.zoo.vae import LATENT_CHANNELS

TEXT_WIDTH = 64
CAPTIONS = tuple(describe_label(label) for label in ALL_LABELS)


def new_transformer() -> WanTransformer3DModel:
    """Six blocks of width 128 over patches of 2 x 2 latents."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=6,
        rope_max_seq_len=64,
    )


def write_text_parts(folder: Path, settings: LoopSettings, device: torch.device, log: Log, track: Track) -> None:
    """The tokenizer and the trained text encoder of a Wan folder."""
    size = write_t5_tokenizer(folder / "tokenizer", sorted({word for text in CAPTIONS for word in text.split()}))
    torch.manual_seed(settings.seed)
    config = UMT5Config(
        vocab_size=size, d_model=TEXT_WIDTH, d_kv=32, d_ff=128, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    encoder = UMT5EncoderModel(config)
    train_text_encoder(encoder, AutoTokenizer.from_pretrained(folder / "tokenizer"), settings, device, log, track)
    encoder.half().save_pretrained(folder / "text_encoder")


def train_text_encoder(
    encoder: UMT5EncoderModel,
    tokenizer: AutoTokenizer,
    settings: LoopSettings,
    device: torch.device,
    log: Log = silent_log,
    track: Track = silent_track,
) -> None:
    """Name shape, colour and motion from the mean of a caption's embeddings; in place, without the heads."""
    heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, size) for size in (len(SHAPES), len(COLOURS), len(MOTIONS)))
    model = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(device)
    tokens = tokenizer(list(CAPTIONS), padding=True, return_tensors="pt")
    labels = torch.tensor([(label.shape, label.colour, label.motion) for label in ALL_LABELS])

    def batch_of(step: int) -> State:
        g = torch.Generator().manual_seed(settings.seed * 7919 + step)
        return {"ids": torch.randint(len(CAPTIONS), (settings.batch_size,), generator=g).tolist()}

    def prepare(batch: State, generator: torch.Generator, step: int) -> State:
        chosen = batch["ids"]
        ids, mask = tokens.input_ids[chosen].to(device), tokens.attention_mask[chosen].to(device)
        return {"ids": ids, "mask": mask, "labels": labels[chosen].to(device)}

    def loss(state: State) -> dict[str, Tensor]:
        hidden = encoder(state["ids"], state["mask"]).last_hidden_state * state["mask"][..., None]
        mean = hidden.sum(1) / state["mask"].sum(1, keepdim=True)
        terms = [F.cross_entropy(head(mean).float(), state["labels"][:, i]) for i, head in enumerate(heads)]
        return {"total": terms[0] + terms[1] + terms[2]}

    player = Player("text_encoder", model, loss, 1e-3)
    train([player], batch_of, prepare, settings, device=device, log=log, track=track)
    assert player.ema is not None
    player.ema.copy_to(model)
    encoder.eval().requires_grad_(False)


def write_wan_parts(folder: Path, frames: int, size: int) -> None:
    """Scheduler, index and the shape that the model was made for, in the layout of a Wan pipeline folder."""
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "WanPipeline",
            "_diffusers_version": "0.42.1",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        },
    )
    write_json(folder / "vdmini.json", {"frames": frames, "height": size, "width": size})
