"""Channels of VAE decoders: random legal plans work and keep the shape, what goes is what weighs least."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.tiny_vaes import CLASSES, LEVELS, TEMPORAL, latents_of, new_decoder
from vdmini_core.models import IllegalPlan
from vdmini_core.models.graph import empty
from vdmini_core.models.narrow import width_of
from vdmini_core.pruning.decoder_channels import decoder_channels, shares_for


@pytest.mark.parametrize("name", CLASSES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_legal_plans_decode_to_the_same_shape(name: str, data: st.DataObject) -> None:
    teacher, latents = new_decoder(name), latents_of(side=3)
    removed = data.draw(st.sets(st.sampled_from(teacher.removable)))
    shares = data.draw(st.tuples(*[st.floats(0.05, 1.0)] * LEVELS))
    channels = decoder_channels(teacher.without(removed))
    student = channels.narrowed(shares)
    clips = student(latents)
    assert clips.shape == teacher(latents).shape
    assert clips.isfinite().all()
    assert sum(p.numel() for p in student.decoder.parameters()) == channels.parameters(shares) <= channels.whole
    rebuilt = empty(type(student.model), student.model.config)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in student.model.state_dict().items()
    }


@pytest.mark.parametrize("name", CLASSES)
def test_every_layer_between_latents_and_pixels_is_in_a_group(name: str) -> None:
    """Halves everything: no layer that works keeps its width, but for the pixels that come out."""
    decoder = new_decoder(name)
    half = decoder_channels(decoder).narrowed((0.5,) * LEVELS)
    for path, module in decoder.decoder.named_modules():
        try:
            before = width_of(module)
        except TypeError:
            continue
        after = width_of(half.decoder.get_submodule(path))
        outer = {"conv_in": 1, "conv_out": 0, "time_conv_out": 0}.get(path.partition(".")[0])
        if path == "time_conv_out":
            assert after == before
            continue
        for side, (was, now) in enumerate(zip(before, after, strict=True)):
            assert now == (was if side == outer else was // 2), (path, before, after)


@pytest.mark.parametrize("name", CLASSES)
def test_channels_that_weigh_nothing_go_first(name: str) -> None:
    decoder = new_decoder(name)
    index, group = next((i, g) for i, g in enumerate(decoder_channels(decoder).groups) if len(g.members) == 3)
    half = len(group.scores) // 2
    for member in group.members:
        own = member.own[member.shared < half]
        for weight in decoder.decoder.get_submodule(member.path).parameters(recurse=False):
            if member.side == 0:
                weight[own] = 0
            elif weight.ndim > 1:
                weight[:, own] = 0
    again = decoder_channels(decoder).groups[index]
    assert again.best(again.count(0.5, 0.5)).tolist() == list(range(half, len(group.scores)))


def test_more_goes_where_the_pixels_are() -> None:
    decoder = new_decoder(TEMPORAL)
    channels = decoder_channels(decoder)
    shares = shares_for(channels, round(0.7 * channels.whole))
    assert shares[0] == 1
    assert shares[0] > shares[1] > shares[2] == 0.5
    assert channels.parameters(shares) == pytest.approx(0.7 * channels.whole, rel=0.03)


def test_a_size_that_cannot_be_reached_is_refused_with_the_nearest() -> None:
    channels = decoder_channels(new_decoder(TEMPORAL))
    with pytest.raises(IllegalPlan, match=r"5 parameters were wanted .* no nearer than \d{3},\d{3}"):
        shares_for(channels, 5)


def test_impossible_shares_are_refused() -> None:
    channels = decoder_channels(new_decoder(TEMPORAL))
    with pytest.raises(IllegalPlan, match=r"expected 3 above 0 and at most 1, one a resolution"):
        channels.narrowed((1.0, 0.0, 1.0))
    with pytest.raises(IllegalPlan, match="expected 3 above 0"):
        channels.narrowed((1.0, 0.5))
