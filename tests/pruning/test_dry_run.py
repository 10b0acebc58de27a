"""What a dry run says: byte counts against counts by hand and against real tensors, and shapes."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.tiny_transformers import new_condition, new_latents, new_transformer
from tests.tiny import GROWING, new_inputs, new_unet
from vdmini_core.data.latents import CONDITION
from vdmini_core.diffusion.process import VPrediction
from vdmini_core.distillation.heads import Discriminator
from vdmini_core.distillation.icmd import ICMD
from vdmini_core.distillation.memory import distillation_memory
from vdmini_core.evaluation.activations import (
    AsOnAccelerator,
    peak_bytes,
    saved_storages,
    storages_of,
    total_bytes,
)
from vdmini_core.models import Condition, Denoiser, UnusableModel
from vdmini_core.models.published import blueprint, meta_inputs, published_names
from vdmini_core.models.vae_facts import VAEFacts, vae_facts
from vdmini_core.pruning.dry_run import sensitivity_memory, units_of
from vdmini_core.settings import DistillSettings

REMOVED = ("D.0.1", "U.3.1")
SHAPE = (4, 4, 16, 16)


def settings_of(precision: str = "fp32", mca_weight: float = 1.0, task: str = "denoising") -> DistillSettings:
    loop = {"max_steps": 1, "batch_size": 1, "precision": precision}
    return DistillSettings.model_validate({"loop": loop, "mca_weight": mca_weight, "task": task})


@functools.cache
def memory_of(
    batch: int = 1, precision: str = "fp32", mca_weight: float = 1.0, task: str = "denoising"
) -> dict[str, int]:
    teacher = new_unet(GROWING).on_meta()
    student, matches = teacher.without(REMOVED), teacher.surviving(REMOVED)
    inputs = meta_inputs(teacher, SHAPE, batch)
    return distillation_memory(teacher, student, matches, settings_of(precision, mca_weight, task), *inputs)


def saved_bytes(denoiser: Denoiser, latents: Tensor, condition: Condition) -> int:
    model = denoiser.model.requires_grad_(True)
    time = torch.full((len(latents),), 0.3, device=latents.device)
    return total_bytes(saved_storages(lambda: denoiser(latents, time, condition), model.parameters()))


def on_meta(tensors: Condition) -> Condition:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["U-Net", "WanTransformer3DModel", "LTXVideoTransformer3DModel"])
def test_what_is_saved_on_meta_is_what_real_tensors_save(name: str) -> None:
    denoiser: Denoiser = new_unet(GROWING) if name == "U-Net" else new_transformer(name)
    latents, condition = new_inputs(2) if name == "U-Net" else (new_latents(2), new_condition(2))
    measured = saved_bytes(denoiser, latents, condition)
    with AsOnAccelerator(autocast=False):
        assert saved_bytes(denoiser.on_meta(), latents.to("meta"), on_meta(condition)) == measured


def test_the_activations_of_a_step_are_those_of_a_real_step() -> None:
    teacher = new_unet(GROWING)
    student = teacher.without(REMOVED)
    heads = Discriminator(teacher.encoder_widths()).requires_grad_(False)
    student.model.requires_grad_(True)
    step = ICMD(teacher, student, heads, teacher.surviving(REMOVED), VPrediction(), settings_of(), torch.device("cpu"))
    latents, condition = new_inputs(1)
    batch = {"latents": latents, **{CONDITION + name: value for name, value in condition.items()}}
    state = step.prepare(step.draw(batch, torch.Generator().manual_seed(0)), 1000)
    weights = itertools.chain(*(module.parameters() for module in (teacher.model, student.model, heads)))
    saved = saved_storages(lambda: step.student_loss(state), weights)
    assert memory_of()["activations"] == pytest.approx(total_bytes(storages_of(state) | saved), rel=0.01)


def test_weights_and_what_the_optimizer_keeps_are_exact() -> None:
    teacher = new_unet(GROWING)
    heads = Discriminator(teacher.encoder_widths())
    whole, small, judge = (
        sum(p.numel() for p in module.parameters()) for module in (teacher.model, teacher.without(REMOVED).model, heads)
    )
    found = memory_of(precision="bf16")
    assert found["teacher_weights"] == 4 * whole
    assert found["student_weights"] == 4 * small
    assert found["discriminator_weights"] == 4 * judge
    assert found["gradients"] == 4 * (small + judge)
    assert found["optimizer"] == 8 * (small + judge)
    assert found["ema"] == 4 * (small + judge)


def test_a_larger_batch_needs_more_activations_and_the_same_weights() -> None:
    found = [memory_of(batch) for batch in (1, 2, 3)]
    assert found[0]["activations"] < found[1]["activations"] < found[2]["activations"]
    weights = [{**parts, "activations": 0} for parts in found]
    assert weights[0] == weights[1] == weights[2]


def test_a_task_with_heads_of_its_own_needs_memory_for_them() -> None:
    plain, other, judged = (memory_of(task=task) for task in ("denoising", "consistency", "one_step"))
    assert other == {**plain, "activations": other["activations"]}
    heads = plain["discriminator_weights"]
    assert judged["discriminator_weights"] == 2 * heads
    assert judged["optimizer"] == plain["optimizer"] + 2 * heads
    assert judged["activations"] > plain["activations"]


def test_half_precision_and_less_loss_need_less() -> None:
    assert memory_of(precision="bf16")["activations"] < memory_of()["activations"]
    without = memory_of(mca_weight=0.0)
    assert without["activations"] < memory_of()["activations"]
    assert without["optimizer"] == 2 * without["student_weights"]


def test_generating_needs_the_weights_and_less_than_training_saves() -> None:
    teacher = new_unet(GROWING).on_meta()
    one, two = (sensitivity_memory(teacher, SHAPE, batch) for batch in (1, 2))
    assert one["teacher_weights"] == two["teacher_weights"] == 4 * sum(p.numel() for p in teacher.model.parameters())
    assert one["activations"] < two["activations"] < saved_bytes(teacher, *meta_inputs(teacher, SHAPE, 2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_counts_what_is_alive_at_once(device: str) -> None:
    def call() -> Tensor:
        first = torch.zeros(1000, device=device)
        second = first + 1
        second.add_(1)
        second.view(10, 100)
        del first
        return second + 1

    assert peak_bytes(call) == 8000


def test_fused_attention_saves_no_scores() -> None:
    tokens, width = 4096, 64
    q, k, v = (torch.zeros(1, 2, tokens, width, device="meta", requires_grad=True) for _ in range(3))
    with AsOnAccelerator(autocast=False):
        saved = saved_storages(lambda: F.scaled_dot_product_attention(q, k, v), [])
    assert total_bytes(saved) == 4 * (4 * 2 * tokens * width + 2 * tokens)


def test_autocast_saves_products_in_bfloat16_and_norms_in_float32() -> None:
    weight = torch.zeros(8, 8, device="meta", requires_grad=True)
    x = torch.zeros(16, 8, device="meta", requires_grad=True)
    with AsOnAccelerator(autocast=True):
        assert total_bytes(saved_storages(lambda: F.linear(x, weight), [weight])) == 2 * (16 * 8 + 8 * 8)
        assert F.layer_norm(F.linear(x, weight), (8,)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("hunyuan-video", (16, 33, 90, 160)),
        ("wan-2.1-1.3b", (16, 21, 60, 104)),
        ("wan-2.2-ti2v-5b", (48, 31, 44, 80)),
        ("cogvideox-2b", (16, 13, 60, 90)),
        ("ltx-video-2b", (128, 21, 16, 22)),
        ("svd-xt", (4, 25, 72, 128)),
        ("t2v-turbo-v2", (4, 16, 40, 64)),
    ],
)
def test_a_published_models_clips_make_these_latents(name: str, shape: tuple[int, ...]) -> None:
    assert blueprint(name).latents == shape


def test_a_packaged_config_is_found_by_each_of_its_names() -> None:
    for name in published_names():
        found = blueprint(name)
        assert all(blueprint(source) == found for source in found.config["_sources"])


@pytest.mark.parametrize(
    ("clip", "told"),
    [
        ((80, 480, 832), r"make them 77 or 81 \(data.frames\)"),
        ((81, 484, 832), "484 x 832 pixels are no multiples of 8"),
    ],
)
def test_clips_that_do_not_fit_the_vae_are_refused(clip: tuple[int, int, int], told: str) -> None:
    vae = blueprint("wan-2.1-1.3b").vae
    assert vae is not None
    with pytest.raises(ValueError, match=told):
        vae.latent_shape(*clip)


def test_latents_that_do_not_fit_the_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="2 x 5 x 6 are no multiples of the patches of 1 x 2 x 2"):
        meta_inputs(new_transformer("WanTransformer3DModel"), (4, 2, 5, 6))


def test_a_vaes_config_says_how_it_compresses() -> None:
    wan = vae_facts({"_class_name": "AutoencoderKLWan", "z_dim": 48, "scale_factor_spatial": 16})
    assert wan == VAEFacts(spatial=16, temporal=4, causal=True, channels=48)
    stable = vae_facts({"_class_name": "AutoencoderKL", "block_out_channels": [1, 1, 1, 1], "latent_channels": 4})
    assert stable == VAEFacts(spatial=8, temporal=1, causal=False, channels=4)
    assert vae_facts({"_class_name": "AutoencoderDC"}) is None


def test_units_of_a_folder_need_its_configs_only(tmp_path: Path) -> None:
    denoiser = new_transformer("WanTransformer3DModel")
    config = {**denoiser.model.config, "_class_name": "WanTransformer3DModel"}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    units, note = units_of(str(tmp_path))
    assert [unit.name for unit in units] == [unit.name for unit in denoiser.units]
    assert {unit.flops for unit in units} == {None}
    assert "does not say what clips" in note
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "z_dim": 4}')
    (tmp_path / "vdmini.json").write_text('{"frames": 5, "height": 32, "width": 48}')
    units, note = units_of(str(tmp_path))
    assert all(unit.flops for unit in units)
    assert "4 x 2 x 4 x 6" in note


@pytest.mark.parametrize(
    ("text", "told"), [("[]", "is no config"), ('{"_class_name": "UNet2D"}', "names the class 'UNet2D'")]
)
def test_a_folder_without_a_known_denoiser_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UnusableModel, match=r"has none of unet/config\.json"):
        units_of(str(tmp_path))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnusableModel, match=told):
        units_of(str(tmp_path))
