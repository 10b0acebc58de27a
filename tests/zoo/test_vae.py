"""The VAE that decodes frame by frame, made from the one whose latents it shares."""

import torch

from vdmini_core.settings import LoopSettings
from vdmini_core.zoo.clips import render_set, to_model_range
from vdmini_core.zoo.vae import new_frame_vae, new_temporal_vae, train_vae


def test_training_the_frame_vae_leaves_its_latents_as_they_are() -> None:
    torch.manual_seed(0)
    trained = new_temporal_vae().requires_grad_(False)
    trained.register_to_config(scaling_factor=0.53)
    clips = render_set(2, 0, frames=4, size=16)
    frames = to_model_range(clips.pixels)[0].transpose(0, 1)
    vae = new_frame_vae(trained)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    settings = LoopSettings(max_steps=8, batch_size=1, warmup_steps=1, ema_decay=0, precision="fp32", log_every=1)
    losses: list[float] = []
    train_vae(
        vae,
        clips,
        settings,
        torch.device("cpu"),
        lambda row, step: losses.append(row["train/vae/l2"]),
        encoder_is_fixed=True,
    )
    changed = {name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder"}
    torch.testing.assert_close(vae.encode(frames).latent_dist.mode(), trained.encode(frames).latent_dist.mode())
    assert vae.config.scaling_factor == 0.53
    assert sum(losses[-3:]) < sum(losses[:3])
