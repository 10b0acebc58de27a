"""The training of every VAE class of the zoo."""

from typing import Any

import pytest
import torch

from vdmini_core.settings import LoopSettings
from vdmini_core.zoo.clips import render_set, to_model_range
from vdmini_core.zoo.vae import _decoded, _posterior, new_causal_vae, new_frame_vae, new_temporal_vae, train_vae


@pytest.mark.parametrize(
    ("new", "factor"), [(new_temporal_vae, 4), (new_frame_vae, 8), (new_causal_vae, 4)], ids=["svd", "frame", "causal"]
)
def test_a_vae_learns_and_leaves_latents_of_unit_variance(new: Any, factor: int) -> None:
    torch.manual_seed(0)
    clips = render_set(2, 0, frames=5, size=16)
    settings = LoopSettings(max_steps=8, batch_size=1, warmup_steps=1, ema_decay=0, precision="fp32", log_every=1)
    losses: list[float] = []
    vae = train_vae(new(), clips, settings, torch.device("cpu"), lambda row, step: losses.append(row["train/vae/l2"]))
    assert sum(losses[-3:]) < sum(losses[:3])

    pixels = to_model_range(clips.pixels)
    if spread := getattr(vae.config, "latents_std", None):
        latents = vae.encode(pixels).latent_dist.mode()

        torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.tensor(spread), rtol=1e-3, atol=1e-3)
    else:
        latents = vae.encode(pixels.transpose(1, 2).flatten(0, 1)).latent_dist.mode()
        assert (latents * vae.config.scaling_factor).std() == pytest.approx(1, abs=1e-3)
    assert latents.shape[-1] == 16 // factor
    assert not any(parameter.requires_grad for parameter in vae.parameters())


@torch.no_grad()
def test_a_whole_clip_at_once_is_what_wans_class_does_frame_by_frame() -> None:
    """Without compression in time, which is why training need not go through its cache."""
    torch.manual_seed(0)
    vae = new_causal_vae().eval()
    for parameter in vae.parameters():  # those that start at zero would hide what they see
        parameter.normal_(std=0.05)
    clips = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    latents = vae.encode(clips).latent_dist.mode()
    torch.testing.assert_close(_posterior(vae, clips).mode(), latents, rtol=1e-4, atol=1e-5)
    decoded = _decoded(vae, latents, 9)
    assert decoded.std() > 1e-3
    torch.testing.assert_close(decoded.clamp(-1, 1), vae.decode(latents).sample, rtol=1e-4, atol=1e-5)
