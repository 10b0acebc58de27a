"""Video transformers: bypass and removal are the same function, and a student is a stock checkpoint."""

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.tiny_transformers import answer_of, new_condition, new_latents, new_transformer
from vdmini_core.models.graph import IllegalPlan
from vdmini_core.models.loading import UnusableModel
from vdmini_core.models.published import published
from vdmini_core.models.transformer import TRANSFORMERS, TransformerDenoiser

HUNYUAN, HUNYUAN15, WAN, COG, LTX, MOCHI = TRANSFORMERS
TEACHERS = {name: new_transformer(name) for name in TRANSFORMERS}
ANSWERS = {name: answer_of(teacher) for name, teacher in TEACHERS.items()}
REMOVED = {name: ("block.1", "block.2") for name in TRANSFORMERS} | {HUNYUAN: ("double.0", "single.0", "single.2")}
TIME = torch.tensor([500.0])
every_class = pytest.mark.parametrize("name", TRANSFORMERS)


def names_of(denoiser: TransformerDenoiser) -> list[str]:
    return [unit.name for unit in denoiser.units]


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def parameters_of(denoiser: TransformerDenoiser) -> int:
    return sum(parameter.numel() for parameter in denoiser.model.parameters())


@every_class
def test_keeping_all_blocks_reproduces_the_teacher_exactly(name: str) -> None:
    assert torch.equal(answer_of(TEACHERS[name].without(())), ANSWERS[name])
    with TEACHERS[name].bypass(()):
        assert torch.equal(answer_of(TEACHERS[name]), ANSWERS[name])


@every_class
def test_every_block_matters_and_bypassed_is_as_good_as_removed(name: str) -> None:
    teacher = TEACHERS[name]
    for unit in names_of(teacher):
        with teacher.bypass([unit]):
            bypassed = answer_of(teacher)
        assert bypassed.isfinite().all()
        assert (bypassed - ANSWERS[name]).abs().max() > 0.01, unit
        if unit != "block.3" or name != MOCHI:
            assert_same(answer_of(teacher.without([unit])), bypassed)


@every_class
def test_a_bypass_ends_with_its_context_even_after_an_error(name: str) -> None:
    teacher = TEACHERS[name]
    with pytest.raises(RuntimeError, match="halfway"), teacher.bypass(names_of(teacher)):
        raise RuntimeError("halfway")
    assert torch.equal(answer_of(teacher), ANSWERS[name])


@every_class
def test_bypass_works_through_gradient_checkpointing(name: str) -> None:
    teacher = new_transformer(name)
    teacher.model.enable_gradient_checkpointing()
    latents = new_latents().requires_grad_()
    with teacher.bypass(REMOVED[name]):
        answer = teacher(latents, TIME, new_condition())
        answer.sum().backward()
        assert_same(answer.detach(), answer_of(teacher))
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


@every_class
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_removal_equals_its_bypass_or_is_refused(name: str, data: st.DataObject) -> None:
    teacher = TEACHERS[name]
    removed = data.draw(st.sets(st.sampled_from(names_of(teacher))))
    if len(removed) == len(teacher.units) or (name == MOCHI and "block.3" in removed):
        with pytest.raises(IllegalPlan):
            teacher.without(removed)
        return
    with teacher.bypass(removed):
        bypassed = answer_of(teacher)
    student = teacher.without(removed)
    assert_same(answer_of(student), bypassed)
    assert list(teacher.surviving(removed).values()) == names_of(student)
    assert set(teacher.surviving(removed)) == set(names_of(teacher)) - removed


@pytest.mark.parametrize(
    ("name", "removed", "reason"),
    [
        (WAN, ["block.0", "block.1", "block.2", "block.3"], r"leaves no block; keep at least one"),
        (HUNYUAN, [f"double.{i}" for i in range(2)] + [f"single.{i}" for i in range(3)], r"leaves no block"),
        (MOCHI, ["block.3"], r"block\.3 has to stay: .*context_pre_only.*; keep block\.3 and remove an earlier block"),
        (LTX, ["single.0"], r"there is no unit single\.0; the units are block\.0"),
    ],
)
def test_illegal_removals_say_why_and_what_to_do(name: str, removed: list[str], reason: str) -> None:
    with pytest.raises(IllegalPlan, match=reason):
        TEACHERS[name].without(removed)


@pytest.mark.parametrize("emptied", ["double", "single"])
def test_hunyuan_works_without_either_kind_of_block(emptied: str) -> None:
    teacher = TEACHERS[HUNYUAN]
    removed = [name for name in names_of(teacher) if name.startswith(emptied)]
    with teacher.bypass(removed):
        bypassed = answer_of(teacher)
    assert_same(answer_of(teacher.without(removed)), bypassed)


@every_class
def test_a_student_is_a_stock_model_with_fewer_blocks_and_can_be_pruned_again(name: str) -> None:
    teacher = TEACHERS[name]
    once = teacher.without(REMOVED[name][:1])
    again = once.surviving(())
    student = once.without([teacher.surviving(REMOVED[name][:1])[unit] for unit in REMOVED[name][1:]])
    assert list(again) == names_of(once)
    assert type(student.model) is TRANSFORMERS[name].stock
    lengths = {blocks.length for blocks in TRANSFORMERS[name].lists}
    changed = {key for key, value in student.model.config.items() if value != teacher.model.config[key]}
    assert changed == lengths
    assert_same(answer_of(student), answer_of(teacher.without(REMOVED[name])))


def test_survivors_close_the_gaps_of_each_list() -> None:
    assert TEACHERS[HUNYUAN].surviving(["double.0", "single.1"]) == {
        "double.1": "double.0",
        "single.0": "single.0",
        "single.2": "single.1",
    }


LAYOUTS: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    (HUNYUAN, {}, (1, 2, 2)),
    (HUNYUAN, {"patch_size_t": 2, "patch_size": 1}, (2, 1, 1)),
    (HUNYUAN15, {"patch_size": 2}, (1, 2, 2)),
    (WAN, {"patch_size": (2, 2, 2)}, (2, 2, 2)),
    (COG, {"use_rotary_positional_embeddings": False}, (1, 2, 2)),
    (COG, {"patch_size_t": 2}, (2, 2, 2)),
    (LTX, {}, (1, 1, 1)),
    (LTX, {"patch_size": 2, "patch_size_t": 2, "in_channels": 32, "out_channels": 32}, (2, 2, 2)),
    (MOCHI, {}, (1, 2, 2)),
]


@pytest.mark.parametrize(("name", "changes", "patch"), LAYOUTS)
def test_a_place_in_the_latents_is_the_same_place_in_the_features_and_the_answer(
    name: str, changes: dict[str, Any], patch: tuple[int, int, int]
) -> None:
    """Without its blocks a transformer sees every patch alone: one changed latent, one changed patch."""
    denoiser = new_transformer(name, **changes)
    first = next(iter(denoiser.tap_modules().values()))
    seen: list[Tensor] = []

    def listen(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(args[0] if args else keywords["hidden_states"])

    first.register_forward_pre_hook(listen, with_kwargs=True)
    latents = new_latents(frames=4)
    moved = latents.clone()
    place = 3, 1, 4
    moved[(0, 2, *place)] += 1
    with torch.no_grad(), denoiser.bypass(names_of(denoiser)):
        before, after = (denoiser(x, TIME, new_condition()) for x in (latents, moved))
    assert before.shape == latents.shape
    patches = [size // p for size, p in zip(latents.shape[2:], patch, strict=True)]
    feature = denoiser.as_video(seen[1] - seen[0], latents).abs().sum(1)[0]
    assert list(feature.shape) == patches
    assert feature.nonzero().tolist() == [[at // p for at, p in zip(place, patch, strict=True)]]
    changed = (after - before).abs().sum(1)[0].nonzero()
    expected = torch.zeros(latents.shape[2:])
    expected[tuple(slice(at // p * p, at // p * p + p) for at, p in zip(place, patch, strict=True))] = 1
    assert changed.tolist() == expected.nonzero().tolist()


@every_class
def test_clips_of_a_batch_do_not_mix(name: str) -> None:
    teacher = TEACHERS[name]
    latents, condition = new_latents(2), new_condition(2)
    condition |= {"frame_rate": torch.tensor([25.0, 12.0]), "guidance": torch.tensor([6000.0, 1000.0])}
    with torch.no_grad():
        both = teacher(latents, torch.tensor([500.0, 200.0]), condition)
        alone = teacher(latents[1:], torch.tensor([200.0]), {key: value[1:] for key, value in condition.items()})
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


@every_class
def test_padded_text_changes_nothing_where_the_model_takes_a_mask(name: str) -> None:
    teacher, condition = TEACHERS[name], new_condition()
    condition["text"][:, -1] += 1
    changed = teacher(new_latents(), TIME, condition)
    if "text_mask" in TRANSFORMERS[name].keywords.values():
        assert_same(changed, ANSWERS[name])
    else:
        assert not torch.equal(changed, ANSWERS[name])


@every_class
def test_a_missing_condition_is_named(name: str) -> None:
    condition = new_condition()
    del condition["text"]
    with pytest.raises(ValueError, match=rf"{name} needs the condition 'text'; given are text_mask, "):
        TEACHERS[name](new_latents(), TIME, condition)


@pytest.mark.parametrize(("name", "key"), [(HUNYUAN, "guidance"), (LTX, "frame_rate")])
def test_guidance_and_frame_rate_reach_the_model(name: str, key: str) -> None:
    condition = new_condition()
    condition[key] = condition[key] / 2
    assert not torch.equal(TEACHERS[name](new_latents(), TIME, condition), ANSWERS[name])
    del condition[key]
    with pytest.raises(ValueError, match=f"needs the condition '{key}'"):
        TEACHERS[name](new_latents(), TIME, condition)


def test_hunyuan_without_guidance_needs_none() -> None:
    condition = new_condition()
    del condition["guidance"]
    assert new_transformer(HUNYUAN, guidance_embeds=False)(new_latents(), TIME, condition).isfinite().all()


def test_ltx_gets_the_positions_that_its_pipeline_gives_it() -> None:
    arguments = TEACHERS[LTX].arguments(new_latents(), TIME, new_condition())
    scale = arguments.pop("rope_interpolation_scale")
    assert scale[1:] == (32, 32)
    answer = TEACHERS[LTX].model(**arguments, rope_interpolation_scale=(8 / 25, 32, 32), return_dict=False)[0]
    assert_same(answer, TEACHERS[LTX].model(**arguments, rope_interpolation_scale=scale, return_dict=False)[0])


def test_cogvideox_gets_rotary_positions_of_its_own_grid() -> None:
    latents = new_latents(frames=3, size=6)
    found = TEACHERS[COG].arguments(latents, TIME, new_condition())["image_rotary_emb"]
    expected = get_3d_rotary_pos_embed(16, ((0, 0), (3, 4)), (3, 4), 3)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_hunyuan_15_takes_a_first_frame_and_is_text_to_video_without() -> None:
    latents, condition = new_latents(), new_condition()
    nothing = {
        "image_latents": torch.zeros(1, 5, *latents.shape[2:]),
        "image_embedding": torch.zeros(1, 7, 6),
    }
    assert_same(TEACHERS[HUNYUAN15](latents, TIME, condition | nothing), ANSWERS[HUNYUAN15])
    for key, tensor in nothing.items():
        given_one = condition | nothing | {key: tensor + 1}
        assert not torch.equal(TEACHERS[HUNYUAN15](latents, TIME, given_one), ANSWERS[HUNYUAN15])


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 30])
def test_the_encoder_is_the_first_two_thirds_and_nothing_after_it_runs(blocks: int) -> None:
    denoiser = new_transformer(WAN, num_layers=blocks)
    stages = denoiser.encoder_stages()
    taps = denoiser.tap_modules()
    depths = [list(taps.values()).index(stage) for stage in stages]
    assert depths == {1: [0], 2: [0], 3: [0, 1], 7: [0, 1, 2, 3], 30: [4, 9, 14, 19]}[blocks]
    after = denoiser.stop_after_encoder()
    assert after is [*taps.values(), denoiser.model.norm_out][depths[-1] + 1]
    ran: list[nn.Module] = []
    for module in [*taps.values(), denoiser.model.norm_out]:
        module.register_forward_hook(lambda module, args, output: ran.append(module))

    def stop(module: nn.Module, args: object) -> None:
        raise InterruptedError

    after.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        answer_of(denoiser)
    assert ran == list(taps.values())[: depths[-1] + 1]


@every_class
def test_encoder_features_are_videos_of_the_stated_width(name: str) -> None:
    denoiser = new_transformer(name)
    found: list[Tensor] = []
    for stage in denoiser.encoder_stages():
        stage.register_forward_hook(
            lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
    latents = new_latents()
    answer_of(denoiser)
    assert [denoiser.as_video(feature, latents).shape[1] for feature in found] == denoiser.encoder_widths()


PUBLISHED = {
    "hunyuan-video": (12_821_012_544, 60),
    "wan-2.1-14b": (14_288_491_584, 40),
    "wan-2.1-1.3b": (1_418_996_800, 30),
    "wan-2.2-ti2v-5b": (4_999_787_712, 30),
    "cogvideox-2b": (1_693_783_872, 30),
    "cogvideox-5b": (5_570_283_072, 42),
    "ltx-video-2b": (1_923_385_472, 28),
    "mochi": (10_027_677_744, 48),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_parameters_and_blocks(name: str) -> None:
    model = published(name)
    assert (parameters_of(model), len(model.units)) == PUBLISHED[name]
    assert {tensor.device.type for tensor in [*model.model.parameters(), *model.model.buffers()]} == {"meta"}


@pytest.mark.parametrize(
    ("name", "removed", "left"),
    [
        (
            "hunyuan-video",
            [f"double.{i}" for i in range(3, 20, 5)] + [f"single.{i}" for i in range(3, 40, 5)],
            10_328_952_896,
        ),
        ("wan-2.1-14b", [f"block.{i}" for i in range(3, 40, 5)], 11_477_337_152),
    ],
)
def test_a_fifth_fewer_blocks_leaves_this_many_parameters(name: str, removed: list[str], left: int) -> None:
    teacher = published(name)
    student = teacher.without(removed)
    assert len(student.units) == 0.8 * len(teacher.units)
    assert parameters_of(student) == left
    assert {tensor.device.type for tensor in [*student.model.parameters(), *student.model.buffers()]} == {"meta"}


def test_an_unknown_published_model_is_refused_with_the_list() -> None:
    with pytest.raises(UnusableModel, match="no config of 'sora'; expected one of cogvideox-2b, cogvideox-5b, "):
        published("sora")
