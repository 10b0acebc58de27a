"""The text-to-video networks and text encoders before and after their training."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from vdmini_core.models import TransformerDenoiser, UNetDenoiser
from vdmini_core.pruning.planning import paper_layout
from vdmini_core.settings import LoopSettings, PlanSettings
from vdmini_core.zoo.text_to_video import (
    CAPTION_TOKENS,
    CAPTIONS,
    TEXT_WIDTH,
    new_text_unet,
    new_transformer,
    write_clip,
)


@pytest.fixture(scope="module")
def unet() -> UNetDenoiser:
    torch.manual_seed(0)
    return UNetDenoiser(new_text_unet().eval())


@torch.no_grad()
def answer(unet: UNetDenoiser, told: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A small input at the highest and at a low level, and what the network makes of it."""
    generator = torch.Generator().manual_seed(told)
    text = torch.randn(2, CAPTION_TOKENS, TEXT_WIDTH, generator=generator)
    guidance = torch.randn(2, 256, generator=generator)
    x = torch.randn(2, 8, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, unet(x, torch.tensor([999, 10]), {"text": text, "guidance": guidance})


def test_the_unet_starts_by_answering_its_input_whatever_it_is_told(unet: UNetDenoiser) -> None:
    x, found = answer(unet)
    assert (found - x).square().mean() < 1e-3
    assert torch.equal(found, answer(unet, told=2)[1])


@torch.no_grad()
def test_the_transformer_starts_by_answering_nearly_its_input() -> None:
    torch.manual_seed(0)
    denoiser = TransformerDenoiser(new_transformer().eval())
    x, text = torch.randn(2, 4, 3, 16, 16), torch.randn(2, 32, TEXT_WIDTH)
    found = denoiser(x, torch.tensor([999.0, 10.0]), {"text": text})
    assert (found - x).square().mean() < 0.2
    assert torch.corrcoef(torch.stack([found.flatten(), x.flatten()]))[0, 1] > 0.9


def test_every_weight_of_the_unet_learns(unet: UNetDenoiser) -> None:
    x = torch.randn(1, 8, 2, 8, 8)
    told = {"text": torch.randn(1, CAPTION_TOKENS, TEXT_WIDTH), "guidance": torch.randn(1, 256)}
    torch.manual_seed(0)
    fresh = UNetDenoiser(new_text_unet().eval())
    optimizer = torch.optim.Adam(fresh.model.parameters(), lr=1e-3)
    for _ in range(3):  # what starts at zero hides what lies before it
        optimizer.zero_grad()
        fresh(x, torch.tensor([500]), told).square().mean().backward()
        optimizer.step()
    still = {name for name, p in fresh.model.named_parameters() if not p.grad.any()}
    # The innermost grid is a single place, which attends to itself whatever the queries and keys are.
    alone = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert still <= {f"{alone}.to_q.weight", f"{alone}.to_k.weight"}


def test_the_papers_layout_takes_over_a_third_of_the_unet(unet: UNetDenoiser) -> None:
    student = unet.without(paper_layout(unet, PlanSettings()))
    left, whole = (sum(p.numel() for p in model.model.parameters()) for model in (student, unet))
    assert 0.35 < 1 - left / whole < 0.4
    assert answer(student)[1].shape == answer(unet)[1].shape
    assert whole * 2 < 9e6  # bytes in float16


def test_the_text_encoder_learns_what_captions_name(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    settings = LoopSettings(max_steps=81, batch_size=64, warmup_steps=20, log_every=20, precision="fp32")
    write_clip(
        tmp_path, settings, torch.device("cpu"), lambda row, step: rows.append(row), lambda steps, *_: iter(steps)
    )
    accuracies = [value for name, value in rows[-1].items() if name.endswith("accuracy")]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.9
    encoder, tokenizer = (
        CLIPTextModel.from_pretrained(tmp_path / "text_encoder"),
        CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    assert max(len(tokenizer(text).input_ids) for text in CAPTIONS) == 7
    tokens = tokenizer(list(CAPTIONS[:2]), padding="max_length", truncation=True, return_tensors="pt")
    assert encoder(tokens.input_ids).last_hidden_state.shape == (2, CAPTION_TOKENS, TEXT_WIDTH)
