"""Channel pruning: which channels go together, which of them stay, and that the network fits its budget."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from tests.models.tiny_transformers import new_transformer
from tests.tiny import GROWING, new_inputs, new_unet, output_of, write_latents
from vdmini_core.data.latents import LatentCache
from vdmini_core.diffusion.process import VPrediction
from vdmini_core.models import UNetDenoiser
from vdmini_core.models.narrow import widths_of
from vdmini_core.pruning import channels
from vdmini_core.pruning.channels import (
    CRITERIA,
    TOLERANCE,
    ChannelGroup,
    Member,
    accumulate_gradients,
    channel_groups,
    channels_for,
    counts_for,
    kept_channels,
    prune_channels,
    tapped_channels,
    widths_for,
)

Groups = tuple[ChannelGroup, ...]


def group_of(scores: list[float], run: int = 1, heads: int = 1, normalised: bool = False) -> ChannelGroup:
    return ChannelGroup(torch.tensor(scores), (), run, heads, normalised)


def test_the_best_channels_stay_in_order() -> None:
    assert group_of([3.0, 1.0, 2.0, 4.0]).best(2).tolist() == [0, 3]


def test_normalisation_groups_stay_or_go_as_a_whole() -> None:
    # Means of runs of two: 5, 3, 4; the single best channel (9) does not save its run's neighbours alone.
    assert group_of([9.0, 1.0, 3.0, 3.0, 4.0, 4.0], run=2).best(2).tolist() == [0, 1, 4, 5]


def test_every_head_loses_as_many_of_its_own() -> None:
    assert group_of([1.0, 2.0, 3.0, 30.0, 20.0, 10.0], heads=2).best(2).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("share", "phase", "count"), [(0.5, 0.0, 2), (0.7, 0.0, 2), (0.7, 0.5, 3), (0.0, 0.0, 1), (1, 0.9, 4)]
)
def test_a_share_is_a_number_of_runs_and_never_none(share: float, phase: float, count: int) -> None:
    assert group_of([1.0] * 8, run=2).count(share, phase) == count


def test_what_lies_under_group_norms_keeps_the_same_share_of_groups() -> None:
    groups = [group_of([1.0] * 64, run=2, normalised=True), group_of([1.0] * 32, normalised=True), group_of([1.0] * 32)]
    counts = counts_for(groups, share=0.5, streams=0.78)
    assert counts[:2] == [25, 25]
    assert counts[2] in (16, 17)


def test_other_architectures_are_refused_by_name(data: LatentCache) -> None:
    with pytest.raises(ValueError, match="worked out for UNetSpatioTemporalConditionModel"):
        prune_channels(new_transformer("WanTransformer3DModel"), "magnitude", 1, data, VPrediction())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return write_latents(tmp_path_factory.mktemp("latents"), 4, size=8)


@pytest.fixture(scope="module")
def teacher() -> UNetDenoiser:
    """Widths that change between stages, and a ResBlock and a feed-forward net with channels that do nothing."""
    denoiser = new_unet(GROWING)
    with torch.no_grad():
        for path in (
            "down_blocks.1.resnets.0.spatial_res_block.conv1",
            "down_blocks.1.resnets.0.spatial_res_block.time_emb_proj",
        ):
            module = denoiser.model.get_submodule(path)
            module.weight[SILENT] = module.bias[SILENT] = 0.0
        denoiser.model.get_submodule("down_blocks.1.resnets.0.spatial_res_block.norm2").bias[SILENT] = 0.0
        denoiser.model.get_submodule("down_blocks.1.resnets.0.spatial_res_block.conv2").weight[:, SILENT] = 0.0
        denoiser.model.get_submodule(FEED_FORWARD).weight[:, SILENT] = 0.0
        denoiser.model.get_submodule(SPLIT).weight[[*SILENT, *(256 + channel for channel in SILENT)]] = 0.0
    return denoiser


SILENT = [6, 7, 20, 21]
FEED_FORWARD = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
SPLIT = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"


@pytest.fixture(scope="module")
def groups(teacher: UNetDenoiser, data: LatentCache) -> Iterator[Groups]:
    """With their Taylor scores; tracing the graph takes seconds."""
    accumulate_gradients(teacher, VPrediction(), data, seed=0, sigma=1.4)
    yield channel_groups(teacher, *new_inputs(size=8), "depgraph-taylor")
    teacher.model.zero_grad(set_to_none=True)


def members_of(groups: tuple[ChannelGroup, ...], path: str, side: int) -> dict[str, Member]:
    (found,) = (g for g in groups if any((m.path, m.side) == (path, side) for m in g.members))
    return {member.path: member for member in found.members}


def test_what_goes_together_is_found_through_blends_splits_and_concatenations(groups: Groups) -> None:
    halves = members_of(groups, FEED_FORWARD, 1)[SPLIT]
    together = dict(zip(halves.own.tolist(), halves.shared.tolist(), strict=True))
    assert together == {channel: channel % 256 for channel in range(512)}  # of the gate with the same of the values
    stream = members_of(groups, "conv_in", 0)
    skip = stream["up_blocks.3.resnets.2.spatial_res_block.norm1"]
    assert skip.own.tolist() == list(range(32, 64))  # behind the 32 of the hidden state
    assert "down_blocks.0.attentions.0.proj_out" in stream
    assert not any("conv_out" in {m.path for m in g.members if m.side == 0} for g in groups)
    assert {g.heads for g in groups if any(m.path.endswith("to_q") and m.side == 0 for m in g.members)} == {1, 2}


def test_channels_that_do_nothing_are_the_first_to_go_and_leave_no_trace(teacher: UNetDenoiser, groups: Groups) -> None:
    counts = [len(group.scores) // (group.heads * group.run) for group in groups]
    paths = [{member.path for member in group.members} for group in groups]
    for path, run in ((FEED_FORWARD, 1), ("down_blocks.1.resnets.0.spatial_res_block.norm2", 2)):
        (index,) = (index for index, found in enumerate(paths) if path in found and len(found) <= 4)
        counts[index] -= len(SILENT) // run
    kept = kept_channels(teacher.model, groups, counts)
    assert sorted(set(range(256)) - set(kept[FEED_FORWARD][1].tolist())) == SILENT
    narrowed = teacher.narrowed(kept)
    torch.testing.assert_close(output_of(narrowed, new_inputs()), output_of(teacher, new_inputs()), rtol=0, atol=1e-5)
    assert widths_for(teacher.model, groups, counts) == widths_of(kept)


def test_scores_of_a_split_projection_are_those_of_its_pairs(teacher: UNetDenoiser, groups: Groups) -> None:
    """Molchanov's formula written out: |w dw| of both halves of the projection and of the inputs behind them."""
    (group,) = (g for g in groups if any((m.path, m.side) == (FEED_FORWARD, 1) for m in g.members))
    behind = teacher.model.get_submodule(FEED_FORWARD).weight
    split = teacher.model.get_submodule(SPLIT).weight
    both = (split * split.grad).abs().sum(1).reshape(2, -1).sum(0)
    expected = (behind * behind.grad).abs().sum(0) + both
    torch.testing.assert_close(group.scores, expected / expected.mean())


def test_the_budget_is_met_and_taps_know_their_channels(teacher: UNetDenoiser, groups: Groups) -> None:
    budget = sum(p.numel() for p in teacher.model.parameters()) * 6 // 10
    kept = channels_for(teacher.model, groups, budget)
    narrowed = teacher.narrowed(kept)
    assert abs(sum(p.numel() for p in narrowed.model.parameters()) / budget - 1) < TOLERANCE
    assert output_of(narrowed, new_inputs()).isfinite().all()
    taps = tapped_channels(teacher, kept)
    assert set(taps) == {unit.name for unit in teacher.units}
    norm = narrowed.model.up_blocks[3].attentions[2].norm
    assert norm.num_channels == len(taps["U.3.2"]) == norm.num_groups
    weight = teacher.model.up_blocks[3].attentions[2].proj_out.bias
    assert torch.equal(narrowed.model.up_blocks[3].attentions[2].proj_out.bias, weight[list(taps["U.3.2"])])


def test_a_budget_out_of_reach_is_refused_with_the_nearest(teacher: UNetDenoiser, groups: Groups) -> None:
    with pytest.raises(ValueError, match=r"1,000 parameters were wanted, .* gets no nearer than"):
        channels_for(teacher.model, groups[:9], 1000)


def test_gradients_are_those_of_the_denoising_loss(data: LatentCache) -> None:
    """One batch of the four clips, against the loss written out."""
    denoiser, process = new_unet(), VPrediction()
    accumulate_gradients(denoiser, process, data, seed=3, sigma=1.4)
    found = denoiser.model.conv_out.weight.grad.clone()
    denoiser.model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(3)
    rows = data.rows([0, 1, 2, 3])
    noise = torch.randn(rows["latents"].shape, generator=generator)
    sigma = (1.4 * torch.randn(4, generator=generator)).exp()
    a = ((1 + sigma**2) ** -0.5)[:, None, None, None, None]
    b = a * sigma[:, None, None, None, None]
    condition = {key.removeprefix("condition."): value for key, value in rows.items() if key.startswith("condition.")}
    denoiser.model.requires_grad_(True)
    answer = denoiser(a * rows["latents"] + b * noise, 0.25 * sigma.log(), condition)
    F.mse_loss(answer, a * noise - b * rows["latents"]).backward()
    torch.testing.assert_close(found, denoiser.model.conv_out.weight.grad)


def test_criteria_are_those_that_the_library_is_asked_for() -> None:
    assert tuple(channels.importances()) == CRITERIA
