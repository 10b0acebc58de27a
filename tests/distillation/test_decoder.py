"""Recovery of a compressed decoder: each term, who learns, resuming, and that it comes closer to the original."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.tiny_vaes import CLASSES, TEMPORAL, latents_of, new_decoder
from tests.tiny import write_latents
from vdmini_core.data.latents import LatentCache
from vdmini_core.distillation.decoder import (
    DecoderRecovery,
    PatchDiscriminator,
    evaluator_distance,
    lpips_distance,
    recover_decoder,
    temporal_loss,
)
from vdmini_core.distillation.decoder_watch import RecoveryWatch
from vdmini_core.evaluation.evaluator import Evaluator
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.pruning.decoder_channels import decoder_channels
from vdmini_core.pruning.decoder_sensitivity import clips_of
from vdmini_core.settings import DecoderSettings
from vdmini_core.training.history import History
from vdmini_core.training.loop import Interrupted

LOOP = {"max_steps": 4, "batch_size": 2, "warmup_steps": 1, "ema_decay": 0.5, "log_every": 1, "precision": "fp32"}
DISCRIMINATOR = {"warmup_steps": 1, "ramp_steps": 2, "channels": 4}
SETTINGS = DecoderSettings.model_validate(
    {"loop": LOOP, "discriminator": DISCRIMINATOR, "validation": {"every": 2, "clips": 2}, "frames": 3, "crop": 5}
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    torch.manual_seed(0)
    return Evaluator().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return write_latents(tmp_path_factory.mktemp("latents"), 6, size=6)


def small(name: str = TEMPORAL) -> VAEDecoder:
    return decoder_channels(new_decoder(name).without(["M", "U.2.1"])).narrowed((1.0, 0.5, 0.5))


def weights_of(decoder: VAEDecoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in decoder.model.state_dict().items()}


def steps_of(evaluator: Evaluator, name: str = TEMPORAL, settings: DecoderSettings = SETTINGS) -> DecoderRecovery:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(4)
    return DecoderRecovery(new_decoder(name), small(name), discriminator, evaluator_distance(evaluator), settings, CPU)


def test_equal_clips_cost_nothing_and_flicker_costs(evaluator: Evaluator) -> None:
    clips = torch.rand(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert evaluator_distance(evaluator)(clips, clips) == 0
    assert temporal_loss(clips, clips) == 0
    assert temporal_loss(clips, clips + 0.1) == pytest.approx(0, abs=1e-6)  # evenly brighter is no flicker
    flickering = clips + 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
    assert temporal_loss(flickering, clips) == pytest.approx(0.2, abs=1e-6)
    assert evaluator_distance(evaluator)(flickering, clips) > 0


def test_windows_are_cut_at_one_place_for_all_clips(evaluator: Evaluator) -> None:
    step, latents = steps_of(evaluator), latents_of(frames=6, side=8, batch=2)
    batch = step.draw({"ids": [0, 1], "latents": latents}, torch.Generator().manual_seed(1))
    assert batch["latents"].shape == (2, 4, 3, 5, 5)
    flat = latents.unfold(2, 3, 1).unfold(3, 5, 1).unfold(4, 5, 1).flatten(2, 4)
    found = batch["latents"].permute(0, 1, 2, 3, 4)
    assert any(torch.equal(flat[:, :, index], found) for index in range(flat.shape[2]))


def test_adversarial_weight_waits_for_the_warm_up_and_rises(evaluator: Evaluator) -> None:
    step = steps_of(evaluator)
    weight = SETTINGS.adversarial_weight
    assert [step.adversarial_weight(at) / weight for at in range(5)] == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("name", CLASSES)
def test_only_the_player_whose_turn_it_is_gets_gradients(name: str, evaluator: Evaluator) -> None:
    step = steps_of(evaluator, name)
    step.student.decoder.requires_grad_(True)
    step.discriminator.requires_grad_(False)
    state = step.prepare({"latents": latents_of(batch=2)}, 5)
    losses = step.decoder_loss(state)
    assert set(losses) == {"total", "reconstruction", "perceptual", "temporal", "adversarial"}
    losses["total"].backward()
    others = [p for key, p in step.student.model.named_parameters() if not key.startswith("decoder.")]
    assert all(p.grad is None for p in [*step.original.model.parameters(), *step.discriminator.parameters(), *others])
    learning = [p.grad is not None for p in step.student.decoder.parameters()]
    assert sum(learning) > 0.9 * len(learning)
    step.student.decoder.requires_grad_(False)
    step.discriminator.requires_grad_(True)
    found = step.discriminator_loss(state)
    found["total"].backward()
    assert all(p.grad is not None for p in step.discriminator.parameters())


def test_recovery_comes_closer_leaves_the_encoder_and_keeps_a_curve(
    evaluator: Evaluator, data: LatentCache, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"loop": SETTINGS.loop.model_copy(update={"max_steps": 12})})
    original, student = new_decoder(TEMPORAL), small()
    before = weights_of(student)
    watch = RecoveryWatch(original, data, settings, History(tmp_path / "history.jsonl"), tmp_path, CPU)
    watch(0, student)
    logged: list[dict[str, float]] = []
    recover_decoder(
        original,
        student,
        data,
        evaluator_distance(evaluator),
        settings,
        CPU,
        log=lambda row, step: logged.append(row),
        watch=watch,
    )
    after = weights_of(student)
    assert all(torch.equal(after[k], before[k]) for k in before if not k.startswith("decoder."))
    assert not torch.equal(after["decoder.conv_in.weight"], before["decoder.conv_in.weight"])
    curve = watch.rows(12)
    assert [row.step for row in curve] == list(range(0, 13, 2))
    assert curve[-1].psnr > curve[0].psnr + 0.3
    assert {"train/decoder/temporal", "train/decoder/perceptual", "train/discriminator/total"} <= set(logged[-1])
    assert not any(p.requires_grad for p in student.model.parameters())
    again = RecoveryWatch(original, data, settings, History(tmp_path / "history.jsonl"), tmp_path, CPU)
    assert again.rows(12) == curve


def test_a_stopped_recovery_goes_on_bit_for_bit(evaluator: Evaluator, data: LatentCache, tmp_path: Path) -> None:
    original, latents = new_decoder(TEMPORAL), data.rows([0, 1])["latents"]

    def recovered(folder: Path, stop_after: int | None = None) -> Tensor:
        student, done = small(), []

        def should_stop() -> bool:
            done.append(0)
            return len(done) == stop_after

        recover_decoder(
            original,
            student,
            data,
            evaluator_distance(evaluator),
            SETTINGS,
            CPU,
            checkpoints=folder,
            fingerprint="one",
            should_stop=should_stop,
        )
        return clips_of(student, latents)

    whole = recovered(tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped after step 2"):
        recovered(tmp_path / "stopped", stop_after=2)
    assert torch.equal(recovered(tmp_path / "stopped"), whole)


def test_alarms_name_settings_of_the_decoder(data: LatentCache, tmp_path: Path) -> None:
    raised: list[str] = []
    settings = SETTINGS.model_copy(update={"discriminator": SETTINGS.discriminator})
    watch = RecoveryWatch(
        new_decoder(TEMPORAL),
        data,
        settings,
        History(tmp_path / "history.jsonl"),
        tmp_path,
        CPU,
        alert=lambda alarm: raised.append(alarm.text),
    )
    dark = small()
    with torch.no_grad():
        for layer in (dark.decoder.conv_out, dark.decoder.time_conv_out):
            layer.weight.zero_()
            layer.bias.zero_()
    watch(2, dark)
    assert any("decoder.validation.alarms.solid_colour is 0.5; lower decoder.learning_rate" in text for text in raised)


def test_lpips_without_its_extra_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(ValueError, match=r"pip install 'vdmini\[lpips\]'"):
        lpips_distance(CPU)
