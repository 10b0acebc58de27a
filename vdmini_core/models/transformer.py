"""Video transformers as block graphs: one implementation for every class that is a list of blocks.

A row of TRANSFORMERS says where a diffusers class keeps its blocks, how they answer and how it is called.
None of the classes stores absolute block indices, so a pruned model is a stock checkpoint: its config
differs in the number of blocks only, and the blocks are numbered anew.

A condition holds, clips first, embeddings in the latents' dtype and numbers in float32:
- "text" [B, L, D]: text embeddings; "text_mask" [B, L]: 1 for a token, 0 for padding (not Wan, CogVideoX);
- "pooled_text" [B, D] (HunyuanVideo): the prompt as one vector;
- "guidance" [B] (HunyuanVideo, where guidance is distilled): the scale as the model takes it, times 1,000;
- "text_2" [B, L2, D2], "text_2_mask" [B, L2] (HunyuanVideo 1.5): glyph embeddings of ByT5;
- "image_latents" [B, C + 1, T, h, w], the given frames and their mask, and "image_embedding" [B, S, E]
  (HunyuanVideo 1.5): left out for text to video;
- "frame_rate" [B] (LTX): frames per second of the clip.

`time` [B] is the timestep as the class takes it, such as 0 ... 1,000. Image inputs of the other classes and
Wan 2.2's times per token are not covered.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import (
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from vdmini_core.models.graph import (
    Condition,
    Denoiser,
    Unit,
    config_of,
    expand,
    first_argument,
)
from vdmini_core.models.loading import class_name, load_component
from vdmini_core.models.removal import Rule, kept

ENCODER_STAGES = 4
LTX_COMPRESSION = 8, 32, 32
"""Pixels of a clip to one latent of LTX's VAE, in time, height and width; its positions count pixels."""


class BlockList(NamedTuple):
    """Units `<prefix>.<i>` are the members of the ModuleList `attribute`, as many as config key `length` says."""

    prefix: str
    attribute: str
    length: str


def _nothing_more(model: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    return {}


def _as_answered(model: Any, output: Tensor, latents: Tensor) -> Tensor:
    return output


@dataclass(frozen=True)
class TransformerRow:
    """How one diffusers class keeps, calls and ends its blocks.

    `lists` in forward order; `joint` blocks answer (hidden, text), others hidden alone; `keywords` maps the
    model's keyword arguments to condition keys; `enter` adds what else it is called with, `leave` brings
    its answer back to [B, C, T, h, w]; `last_stays` says why the last block cannot go, "" where it can.
    """

    stock: type[Any]
    joint: bool
    keywords: Mapping[str, str]
    lists: tuple[BlockList, ...] = (BlockList("block", "transformer_blocks", "num_layers"),)
    enter: Callable[[Any, Tensor, Tensor, Condition], dict[str, Any]] = _nothing_more
    leave: Callable[[Any, Tensor, Tensor], Tensor] = _as_answered
    last_stays: str = ""


class TransformerDenoiser(Denoiser):
    """A video transformer: units block.<i>, or double.<i> and single.<i>; every block is a unit of its own."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.row = next(row for row in TRANSFORMERS.values() if isinstance(model, row.stock))
        places = [
            (f"{prefix}.{index}", f"{attribute}.{index}")
            for prefix, attribute, _ in self.row.lists
            for index in range(len(getattr(model, attribute)))
        ]
        self.units = tuple(Unit(name, name, depth, (path,)) for depth, (name, path) in enumerate(places))

    def __call__(self, latents: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Latents [B, C, T, h, w] at `time` [B] -> its answer, so shaped; ValueError where a condition is missing."""
        output = self.model(**self.arguments(latents, time, condition), return_dict=False)[0]
        return self.row.leave(self.model, output, latents)

    def arguments(self, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
        """The stock model's keyword arguments for a call; ValueError where a condition is missing."""
        try:
            told = {keyword: condition[key] for keyword, key in self.row.keywords.items()}
            more = self.row.enter(self.model, latents, time, condition)
        except KeyError as error:
            name, given = self.row.stock.__name__, ", ".join(condition) or "none"
            raise ValueError(f"{name} needs the condition {error}; given are {given}") from None
        return {"hidden_states": latents, "timestep": time} | told | more

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Every removal is legal that leaves a block, and the last one where the class needs it."""
        names = [unit.name for unit in self.units]
        one = Rule(dict.fromkeys(names, 1), 1, len(names), lambda removed: "leaves no block; keep at least one")
        if not self.row.last_stays:
            return (one,)
        instead = f"keep {names[-1]} and remove an earlier block instead"
        return *kept(names[-1:], f"but {names[-1]} has to stay: {self.row.last_stays}; {instead}"), one

    def identity_of(self, unit: Unit) -> Mapping[str, Callable[..., Any]]:
        """A silent block passes on the hidden state, and the text beside it where it answers both."""
        return {unit.modules[0]: both_streams if self.row.joint else first_argument}

    def trimmed(self, model: nn.Module, removed: set[str]) -> tuple[type[Any], dict[str, Any]]:
        """The stock class with fewer blocks in its config."""
        config = config_of(self.model)
        for prefix, attribute, length in self.row.lists:
            blocks = enumerate(getattr(model, attribute))
            kept = nn.ModuleList(block for index, block in blocks if f"{prefix}.{index}" not in removed)
            setattr(model, attribute, kept)
            config[length] = len(kept)
        return self.row.stock, config

    def surviving(self, names: Iterable[str]) -> dict[str, str]:
        """Teacher unit -> student unit: each list closes its gaps."""
        removed = set(expand(names, self.units))
        matches: dict[str, str] = {}
        for prefix, _, _ in self.row.lists:
            kept = [u.name for u in self.units if u.name not in removed and u.name.startswith(f"{prefix}.")]
            matches |= {name: f"{prefix}.{index}" for index, name in enumerate(kept)}
        return matches

    def _encoder(self) -> list[Unit]:
        end = max(1, 2 * len(self.units) // 3)
        count = min(ENCODER_STAGES, end)
        return [self.units[(index + 1) * end // count - 1] for index in range(count)]

    def encoder_stages(self) -> list[nn.Module]:
        """Up to four blocks, evenly spaced over the first two thirds; the last one ends them."""
        return [self.model.get_submodule(unit.modules[0]) for unit in self._encoder()]

    def encoder_widths(self) -> list[int]:
        """The model's inner width, once a stage."""
        config = self.model.config
        return [int(config.num_attention_heads * config.attention_head_dim)] * len(self._encoder())

    def stop_after_encoder(self) -> nn.Module:
        """The block after the encoder's last, or the output norm where that is the only block."""
        after = self.units[self._encoder()[-1].depth + 1 :]
        return self.model.get_submodule(after[0].modules[0] if after else "norm_out")  # type: ignore[no-any-return]

    def as_video(self, feature: Tensor, latents: Tensor) -> Tensor:
        """Video tokens [B, T' * h' * w', D] -> [B, D, T', h', w'], counted in patches."""
        patches = [size // patch for size, patch in zip(latents.shape[2:], patch_size(self.model), strict=True)]
        return feature.transpose(1, 2).unflatten(2, patches)  # type: ignore[no-any-return]


def both_streams(hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Stands in for a block that passes on the video and the text it was given."""
    return hidden_states, encoder_hidden_states


def patch_size(model: Any) -> tuple[int, int, int]:
    """Latents to one token in time, height and width."""
    size = model.config.patch_size
    return (model.config.get("patch_size_t") or 1, size, size) if isinstance(size, int) else tuple(size)


def _enter_hunyuan(model: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    return {"guidance": condition["guidance"]} if model.config.guidance_embeds else {}


def _enter_hunyuan15(model: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    """Image inputs of zeros mean text to video; the time embedding is computed in the dtype of `time`."""
    batch, channels, *video = latents.shape
    image = condition.get("image_latents", latents.new_zeros(batch, channels + 1, *video))
    embedding = condition.get("image_embedding", latents.new_zeros(batch, 1, model.config.image_embed_dim))
    return {
        "hidden_states": torch.cat([latents, image], 1),
        "timestep": time.to(latents.dtype),
        "image_embeds": embedding,
    }


def _enter_cogvideox(model: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    """Frames before channels; rotary positions, where the model has them, come from the pipeline."""
    more: dict[str, Any] = {"hidden_states": latents.transpose(1, 2)}
    if model.config.use_rotary_positional_embeddings:
        frames, height, width = latents.shape[2:]
        pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=1)
        positions = CogVideoXPipeline._prepare_rotary_positional_embeddings
        more["image_rotary_emb"] = positions(pipeline, height, width, frames, latents.device)
    return more


def _leave_cogvideox(model: Any, output: Tensor, latents: Tensor) -> Tensor:
    return output.transpose(1, 2)


def _enter_ltx(model: Any, latents: Tensor, time: Tensor, condition: Condition) -> dict[str, Any]:
    """Latents packed to tokens [B, N, C]; positions are scaled to seconds and pixels."""
    t, size, _ = patch_size(model)
    frames, height, width = latents.shape[2:]
    per_latent, *pixels = LTX_COMPRESSION
    return {
        "hidden_states": LTXPipeline._pack_latents(latents, size, t),
        "num_frames": frames // t,
        "height": height // size,
        "width": width // size,
        "rope_interpolation_scale": (per_latent / condition["frame_rate"].view(-1, 1, 1, 1, 1), *pixels),
    }


def _leave_ltx(model: Any, output: Tensor, latents: Tensor) -> Tensor:
    t, size, _ = patch_size(model)
    frames, height, width = latents.shape[2:]
    return LTXPipeline._unpack_latents(output, frames // t, height // size, width // size, size, t)  # type: ignore[no-any-return]


TEXT = {"encoder_hidden_states": "text"}
MASKED_TEXT = TEXT | {"encoder_attention_mask": "text_mask"}

TRANSFORMERS = {
    row.stock.__name__: row
    for row in (
        TransformerRow(
            stock=HunyuanVideoTransformer3DModel,
            joint=True,
            keywords=MASKED_TEXT | {"pooled_projections": "pooled_text"},
            lists=(
                BlockList("double", "transformer_blocks", "num_layers"),
                BlockList("single", "single_transformer_blocks", "num_single_layers"),
            ),
            enter=_enter_hunyuan,
        ),
        TransformerRow(
            stock=HunyuanVideo15Transformer3DModel,
            joint=True,
            keywords=MASKED_TEXT | {"encoder_hidden_states_2": "text_2", "encoder_attention_mask_2": "text_2_mask"},
            enter=_enter_hunyuan15,
        ),
        TransformerRow(
            stock=WanTransformer3DModel,
            joint=False,
            keywords=TEXT,
            lists=(BlockList("block", "blocks", "num_layers"),),
        ),
        TransformerRow(
            stock=CogVideoXTransformer3DModel,
            joint=True,
            keywords=TEXT,
            enter=_enter_cogvideox,
            leave=_leave_cogvideox,
        ),
        TransformerRow(
            stock=LTXVideoTransformer3DModel,
            joint=False,
            keywords=MASKED_TEXT,
            enter=_enter_ltx,
            leave=_leave_ltx,
        ),
        TransformerRow(
            stock=MochiTransformer3DModel,
            joint=True,
            keywords=MASKED_TEXT,
            last_stays="Mochi builds its last block without the text's output path (context_pre_only), "
            "which no other block's weights fit",
        ),
    )
}


def load_transformer(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TransformerDenoiser:
    """Load a transformer's folder, a teacher's or a student's: both are stock diffusers checkpoints."""
    stock = TRANSFORMERS[class_name(folder, TRANSFORMERS)].stock
    return TransformerDenoiser(load_component(stock, folder, dtype).to(device))
