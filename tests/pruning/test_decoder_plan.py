"""The plan of a decoder: least damage within a budget of time, against brute force; the paper's layout; refusals."""

from itertools import combinations, product

import pytest
from diffusers import AutoencoderKLTemporalDecoder

from tests.models.tiny_vaes import CAUSAL, CLASSES, FRAME, TEMPORAL, latents_of, new_decoder
from vdmini_core.artifacts import DecoderSensitivity
from vdmini_core.models import IllegalPlan
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.models.graph import empty
from vdmini_core.pruning.decoder_plan import (
    compressed,
    describe_decoder_plan,
    interpolated,
    make_decoder_plan,
    predicted_ms,
)
from vdmini_core.pruning.decoder_sensitivity import SHARES, decoder_sensitivity, sensitivity_table
from vdmini_core.settings import DecoderSettings

SHAPE = (1, 4, 3, 4, 4)
SVD = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
}


@pytest.fixture(scope="module")
def measured() -> DecoderSensitivity:
    return decoder_sensitivity(new_decoder(FRAME), latents_of(batch=2), runs=2)


def test_the_sensitivity_has_every_part_and_every_resolution(measured: DecoderSensitivity) -> None:
    decoder = new_decoder(FRAME)
    names = [part.name for part in measured.parts]
    assert names == [*(unit.name for unit in decoder.units), "in", "U.0.up", "U.1.up", "out"]
    assert [part.name for part in measured.parts if part.damage is not None] == list(decoder.removable)
    assert all(part.time_ms[str(share)] > 0 for part in measured.parts for share in SHARES)
    assert sum(part.parameters for part in measured.parts) == sum(p.numel() for p in decoder.decoder.parameters())
    assert {(score.level, score.share) for score in measured.channels} == set(product(range(3), SHARES[1:]))
    assert all(score.damage > 0 for score in measured.channels)
    assert "| M |" in sensitivity_table(measured)


def known(decoder: VAEDecoder, damages: dict[str, float]) -> DecoderSensitivity:
    """A sensitivity with times that are FLOPs at full width, quadratic in the share, and these damages."""
    found = decoder_sensitivity(decoder, latents_of(batch=1), runs=1)
    parts = tuple(
        part.model_copy(
            update={
                "time_ms": {str(s): s * s * part.flops / 1e6 for s in SHARES},
                "damage": None if part.damage is None else damages[part.name],
            }
        )
        for part in found.parts
    )
    whole = {str(s): sum(part.time_ms[str(s)] for part in parts) for s in SHARES}
    channels = tuple(
        score.model_copy(update={"damage": (1 - score.share) * (1 + score.level)}) for score in found.channels
    )
    return found.model_copy(update={"parts": parts, "whole_ms": whole, "channels": channels})


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_the_plan_has_the_least_damage_of_all_within_the_budget(ratio: float) -> None:
    decoder = new_decoder(FRAME)
    damages = {name: 0.3 + 0.2 * index for index, name in enumerate(decoder.removable)}
    found = known(decoder, damages)
    channel = {(s.level, s.share): s.damage for s in found.channels} | {(level, 1.0): 0.0 for level in range(3)}
    budget = ratio * predicted_ms(found, (), (1.0,) * 3) * (1 + 1e-9)
    best = min(
        sum(damages[name] for name in removed) + sum(channel[level, share] for level, share in enumerate(shares))
        for count in range(len(damages) + 1)
        for removed in combinations(damages, count)
        for shares in product(SHARES, repeat=3)
        if predicted_ms(found, removed, shares) <= budget
    )
    plan = make_decoder_plan(decoder, DecoderSettings(ratio=ratio, channel_weight=1), SHAPE, found)
    assert plan.predicted_ratio is not None
    assert plan.predicted_ratio <= ratio + 1e-6
    total = sum(damages[name] for name in plan.removed)
    assert total + sum(channel[level, share] for level, share in enumerate(plan.shares)) == pytest.approx(best)


@pytest.mark.parametrize("name", CLASSES)
def test_a_plan_says_what_the_decoder_made_from_it_is(name: str) -> None:
    decoder = new_decoder(name)
    settings = DecoderSettings(method="manual", remove=("M", "U.2.1"), shares=(1.0, 0.5, 0.75))
    plan = make_decoder_plan(decoder, settings, SHAPE)
    student = compressed(decoder, plan)
    assert plan.removed == ("M", "U.2.1")
    assert plan.predicted_ms is None
    assert sum(p.numel() for p in student.decoder.parameters()) == plan.parameters[1] < plan.parameters[0]
    assert plan.layout == (decoder.layout(), student.layout())
    assert 0 < plan.flops[1] < plan.flops[0]
    assert "- removed: M, U.2.1" in describe_decoder_plan(plan)


def test_the_papers_layout_of_svds_decoder_has_its_size() -> None:
    """63,579,183 -> 39.17 M: without weights, on the meta device."""
    decoder = VAEDecoder(empty(AutoencoderKLTemporalDecoder, SVD).to("meta").eval())
    plan = make_decoder_plan(decoder, DecoderSettings(method="paper"), (1, 4, 2, 8, 8))
    assert plan.removed == ("M", "U.3.1", "U.3.2")
    assert plan.parameters[0] == 63_579_183
    assert plan.parameters[1] == pytest.approx(39.2e6, rel=0.01)
    assert plan.layout[0] == "mid 512, up blocks 3 x 512, 3 x 512, 3 x 256, 3 x 128"
    assert plan.layout[1].startswith("no mid, up blocks 3 x 512, 3 x 4")
    assert plan.flops[1] < 0.41 * plan.flops[0]


@pytest.mark.parametrize(("name", "removed"), [(TEMPORAL, ("M", "U.2.1", "U.2.2")), (CAUSAL, ("M", "U.2.1"))])
def test_the_papers_layout_keeps_the_first_layer_of_the_last_block(name: str, removed: tuple[str, ...]) -> None:
    assert make_decoder_plan(new_decoder(name), DecoderSettings(method="paper"), SHAPE).removed == removed


def test_times_between_shares_are_interpolated() -> None:
    times = [100.0, 80.0, 50.0, 30.0, 20.0]
    assert [interpolated(times, share) for share in (1.0, 0.875, 0.5, 0.125)] == [100.0, 90.0, 50.0, 10.0]


def test_what_cannot_be_planned_is_refused_with_the_reason() -> None:
    decoder = new_decoder(FRAME)
    with pytest.raises(IllegalPlan, match="optimal needs measured damages and times"):
        make_decoder_plan(decoder, DecoderSettings(), SHAPE)
    with pytest.raises(IllegalPlan, match=r"changes the width 64 -> 32"):
        make_decoder_plan(decoder, DecoderSettings(method="manual", remove=("U.2.0",)), SHAPE)
    found = known(decoder, dict.fromkeys(decoder.removable, 1.0))
    with pytest.raises(IllegalPlan, match=r"no legal removal leaves 0\.001 of the teacher's decoding time"):
        make_decoder_plan(decoder, DecoderSettings(ratio=0.001), SHAPE, found)
