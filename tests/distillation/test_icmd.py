"""One ICMD step: who receives gradients, what the heads read, and when they count."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny_transformers import new_condition, new_latents, new_transformer
from tests.tiny import new_inputs, new_unet, output_of, write_latents
from vdmini_core.data.latents import LatentCache
from vdmini_core.diffusion.process import VPrediction
from vdmini_core.distillation.heads import Discriminator
from vdmini_core.distillation.icmd import ICMD, distill
from vdmini_core.distillation.taps import encoder_features, tapped
from vdmini_core.models import Condition, Denoiser, UNetDenoiser
from vdmini_core.models.narrow import all_channels
from vdmini_core.settings import DiscriminatorSettings, DistillSettings, LoopSettings
from vdmini_core.training.distributed import State

REMOVED = ("D.0.1", "U.3.1")
LOOP = LoopSettings(max_steps=2, batch_size=2, warmup_steps=0, precision="fp32", log_every=1, checkpoint_every=1)
HEADS = DiscriminatorSettings(warmup_steps=10, ramp_steps=20)
SETTINGS = DistillSettings(loop=LOOP, mca_weight=2.0, discriminator=HEADS)


class Players:
    """A teacher, a student without two pairs, and the heads, with one step's batch."""

    def __init__(self, data: LatentCache, settings: DistillSettings = SETTINGS) -> None:
        self.teacher = new_unet()
        self.student = self.teacher.without(REMOVED)
        self.student.model.requires_grad_(True)
        torch.manual_seed(1)
        self.heads = Discriminator(self.teacher.encoder_widths())
        self.batch = data.shuffled(0, 2, 0)
        matches = self.teacher.surviving(REMOVED)
        self.step = ICMD(self.teacher, self.student, self.heads, matches, VPrediction(), settings, torch.device("cpu"))

    def prepare(self, step: int, seed: int = 0) -> State:
        return self.step.prepare(self.step.draw(self.batch, torch.Generator().manual_seed(seed)), step)

    def touched(self) -> dict[str, bool]:
        """Whether any parameter of each player received a gradient."""
        modules = {"teacher": self.teacher.model, "student": self.student.model, "heads": self.heads}
        return {name: any(p.grad is not None for p in module.parameters()) for name, module in modules.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return write_latents(tmp_path_factory.mktemp("latents"), 4, size=8)


def test_the_students_turn_touches_the_student_alone(data: LatentCache) -> None:
    players = Players(data)
    players.heads.requires_grad_(False)
    state = players.prepare(step=30)
    players.step.student_loss(state)["total"].backward()
    assert players.touched() == {"teacher": False, "student": True, "heads": False}
    assert all(p.grad is not None for p in players.student.model.parameters())


def test_the_discriminators_turn_touches_the_heads_alone(data: LatentCache) -> None:
    players = Players(data)
    state = players.prepare(step=30)
    players.heads.requires_grad_(False)
    players.step.student_loss(state)
    players.heads.requires_grad_(True)
    players.step.discriminator_loss(state)["total"].backward()
    assert players.touched() == {"teacher": False, "student": False, "heads": True}
    assert all(p.grad is not None for p in players.heads.parameters())


def test_the_adversarial_loss_reaches_the_student_only_after_the_warm_up(data: LatentCache) -> None:
    gradients = {}
    for step in (5, 30):
        players = Players(data)
        losses = players.step.student_loss(players.prepare(step))
        assert losses["mca"].requires_grad is (step == 30)
        losses["total"].backward()
        gradients[step] = players.student.model.conv_in.weight.grad
    assert not torch.allclose(gradients[5], gradients[30])


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 0.0), (9, 0.0), (10, 0.0), (15, 0.5), (20, 1.0), (30, 2.0), (1000, 2.0)]
)
def test_the_adversarial_weight_is_zero_then_a_ramp_then_constant(data: LatentCache, step: int, weight: float) -> None:
    players = Players(data)
    assert players.step.mca_weight(step) == pytest.approx(weight)
    assert players.prepare(step)["mca_weight"] == pytest.approx(weight)


def test_the_total_is_the_weighted_sum(data: LatentCache) -> None:
    players = Players(data)
    losses = players.step.student_loss(players.prepare(step=20))
    expected = losses["task"] + SETTINGS.icd_weight * losses["icd"] + 1.0 * losses["mca"]
    torch.testing.assert_close(losses["total"], expected)
    assert losses["icd"] > 0


def test_a_student_that_is_the_teacher_has_no_content_loss_and_its_task_loss(data: LatentCache) -> None:
    teacher = new_unet()
    heads = Discriminator(teacher.encoder_widths())
    matches = {unit.name: unit.name for unit in teacher.units}
    step = ICMD(teacher, teacher.without(()), heads, matches, VPrediction(), SETTINGS, torch.device("cpu"))
    state = step.prepare(step.draw(data.shuffled(0, 2, 0), torch.Generator().manual_seed(0)), 30)
    losses = step.student_loss(state)
    assert losses["icd"].item() == 0
    assert all(torch.equal(fake, real) for fake, real in zip(state["fake"], state["real"], strict=True))
    assert step.discriminator_loss(state)["real_minus_fake"].item() == 0


def test_the_target_is_the_velocity_of_the_clip(data: LatentCache) -> None:
    players = Players(data)
    state = players.prepare(step=0)
    again = VPrediction().clean(state["target"], state["noisy"], state["sigma"])
    torch.testing.assert_close(again, players.batch["latents"], rtol=0, atol=1e-3)


def test_the_target_may_be_what_the_teacher_answers(data: LatentCache) -> None:
    players = Players(data, SETTINGS.model_copy(update={"target": "teacher"}))
    state = players.prepare(step=0)
    answer = players.teacher(state["noisy"], VPrediction().time(state["sigma"]), state["condition"])
    torch.testing.assert_close(state["target"], answer)
    assert not state["target"].requires_grad


def test_the_step_is_a_function_of_the_generator(data: LatentCache) -> None:
    players = Players(data)
    first, same, other = players.prepare(0, seed=0), players.prepare(0, seed=0), players.prepare(0, seed=1)
    assert torch.equal(first["noisy"], same["noisy"])
    assert torch.equal(first["real"][0], same["real"][0])
    assert not torch.equal(first["noisy"], other["noisy"])


def test_without_the_adversarial_loss_there_are_no_heads_to_feed(data: LatentCache) -> None:
    players = Players(data, SETTINGS.model_copy(update={"mca_weight": 0.0}))
    state = players.prepare(step=30)
    assert sorted(players.step.student_loss(state)) == ["icd", "task", "total"]
    assert "real" not in state
    assert "fake" not in state


def test_encoder_features_are_the_stage_outputs_of_a_full_pass(
    tiny_unet: UNetDenoiser, inputs: tuple[Tensor, Condition]
) -> None:
    latents, condition = inputs
    stages: dict[str, nn.Module] = {str(i): stage for i, stage in enumerate(tiny_unet.encoder_stages())}
    with tapped(stages) as found:
        whole = output_of(tiny_unet, inputs)
    with tapped({"after": tiny_unet.model.conv_out}) as later, torch.no_grad():
        features = encoder_features(tiny_unet, latents, torch.tensor([0.3]), condition)
    assert later == {}
    assert [f.shape for f in features] == [(1, 32, 4, size, size) for size in (8, 4, 2, 2)]
    for index, feature in enumerate(features):
        assert torch.equal(feature[0].transpose(0, 1), found[str(index)])
    assert torch.equal(output_of(tiny_unet, inputs), whole)


@pytest.mark.parametrize("name", ["U-Net", "WanTransformer3DModel"])
def test_a_checkpointed_teacher_gives_the_heads_the_same_features_and_gradients(name: str) -> None:
    denoiser: Denoiser = new_unet() if name == "U-Net" else new_transformer(name)
    latents, condition = new_inputs() if name == "U-Net" else (new_latents(), new_condition())
    found = []
    for kept in (denoiser.checkpointed, nullcontext):
        noisy = latents.clone().requires_grad_()
        with kept():
            features = encoder_features(denoiser, noisy, torch.tensor([0.3]), condition)
            torch.stack([feature.square().mean() for feature in features]).sum().backward()
        found.append([noisy.grad, *features])
    for again, once in zip(*found, strict=True):
        torch.testing.assert_close(again, once)


def test_a_class_without_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = new_unet()
    monkeypatch.setattr(type(denoiser.model), "_supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match=r"distill\.checkpointing is true, but UNetSpatio.* set it to false"):
        denoiser.checkpointed().__enter__()


def test_every_stage_has_two_heads_that_keep_the_place_of_its_features() -> None:
    heads = Discriminator([8, 12])
    features = [torch.randn(2, 8, 4, 6, 6), torch.randn(2, 12, 4, 3, 3)]
    logits = heads(features, torch.tensor([0.1, -0.3]))
    assert [tuple(value.shape) for value in logits] == [(2, 1, 4, 6, 6)] * 2 + [(2, 1, 4, 3, 3)] * 2
    other = heads(features, torch.tensor([0.1, 0.9]))
    assert torch.equal(logits[0][0], other[0][0])
    assert not torch.equal(logits[0][1], other[0][1])


def test_distilling_ends_with_the_averaged_student_and_an_untouched_teacher(data: LatentCache, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"discriminator": DiscriminatorSettings(warmup_steps=0, ramp_steps=1)})
    teacher = new_unet()
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    student = teacher.without(REMOVED)
    start = student.model.conv_in.weight.clone()
    seen: dict[int, dict[str, float]] = {}
    distill(
        teacher,
        student,
        teacher.surviving(REMOVED),
        VPrediction(),
        data,
        settings,
        torch.device("cpu"),
        checkpoints=tmp_path,
        log=lambda metrics, step: seen.update({step: metrics}),
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert not torch.equal(student.model.conv_in.weight, start)
    assert not student.model.training
    assert not any(p.requires_grad for p in student.model.parameters())
    assert sorted(seen) == [0, 1]
    assert {"train/student/total", "train/student/mca", "train/discriminator/total"} <= set(seen[0])


def test_checkpointing_and_compiling_change_no_number(data: LatentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def compile_in_name(forward: Callable[..., object], **options: object) -> Callable[..., object]:
        compiled.append(forward)
        return lambda *args, **named: forward(*args, **named)

    monkeypatch.setattr(torch, "compile", compile_in_name)
    heads = DiscriminatorSettings(warmup_steps=0, ramp_steps=1)
    curves: dict[str, list[dict[str, float]]] = {"": [], "checkpointing": [], "compile": []}
    for option, rows in curves.items():
        settings = SETTINGS.model_copy(update={"discriminator": heads} | ({option: True} if option else {}))
        teacher = new_unet()
        student = teacher.without(REMOVED)

        def log(metrics: dict[str, float], step: int, rows: list[dict[str, float]] = rows) -> None:
            rows.append(metrics)

        matches = teacher.surviving(REMOVED)
        distill(teacher, student, matches, VPrediction(), data, settings, torch.device("cpu"), log=log)
        modules = [*teacher.model.modules(), *student.model.modules()]
        assert not any("forward" in vars(module) for module in modules)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in modules)
    assert curves["checkpointing"] == curves["compile"] == curves[""]
    assert len(compiled) == sum(len(unit.modules) for unit in (*teacher.units, *student.units))


def without_half_of_the_last_stream(teacher: UNetDenoiser, left: list[int]) -> UNetDenoiser:
    """The network in which the channels that U.3.2 answers are halved, and all that reads or writes them."""
    resnet, attention = "up_blocks.3.resnets.2", "up_blocks.3.attentions.2"
    outputs = (f"{resnet}.spatial_res_block.conv2", f"{resnet}.spatial_res_block.conv_shortcut")
    outputs += (f"{resnet}.temporal_res_block.conv2", f"{attention}.proj_out")
    inputs = (f"{resnet}.temporal_res_block.conv1", f"{attention}.proj_in", "conv_out")
    norms = (f"{resnet}.temporal_res_block.norm1", f"{attention}.norm", "conv_norm_out")
    stay = torch.tensor(left)
    whole = {path: all_channels(teacher.model.get_submodule(path)) for path in (*outputs, *inputs)}
    kept = {path: (stay, whole[path][1]) for path in outputs} | {path: (whole[path][0], stay) for path in inputs}
    return teacher.narrowed(kept | {path: (stay,) for path in norms})


def test_a_feature_that_lost_channels_is_compared_with_the_teachers_same_ones(data: LatentCache) -> None:
    teacher, left = new_unet(), list(range(0, 32, 2))
    student, matches = without_half_of_the_last_stream(teacher, left), {"D.2.1": "D.2.1", "U.3.2": "U.3.2"}
    settings, device = SETTINGS.model_copy(update={"mca_weight": 0.0}), torch.device("cpu")
    step = ICMD(teacher, student, None, matches, VPrediction(), settings, device, channels={"U.3.2": left})
    state = step.prepare(step.draw(data.shuffled(0, 2, 0), torch.Generator().manual_seed(0)), 0)
    found = step.student_loss(state)["icd"]
    features = []
    for denoiser in (teacher, student):
        with tapped({name: denoiser.tap_modules()[name] for name in matches}) as taps:
            denoiser(state["noisy"], VPrediction().time(state["sigma"]), state["condition"])
            features.append(dict(taps))
    of_teacher, of_student = features
    assert of_student["U.3.2"].shape[1] == 16
    expected = (of_teacher["U.3.2"][:, left] - of_student["U.3.2"]).square().mean()
    expected += (of_teacher["D.2.1"] - of_student["D.2.1"]).square().mean()
    torch.testing.assert_close(found, expected)
    assert found > 0


def test_a_student_with_fewer_channels_is_trained_whole_again(data: LatentCache) -> None:
    teacher, left = new_unet(), list(range(0, 32, 2))
    student = without_half_of_the_last_stream(teacher, left)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    distill(
        teacher,
        student,
        {"U.3.2": "U.3.2"},
        VPrediction(),
        data,
        SETTINGS,
        torch.device("cpu"),
        channels={"U.3.2": left},
    )
    after = student.model.state_dict()
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert not torch.equal(after["conv_out.weight"], before["conv_out.weight"])
