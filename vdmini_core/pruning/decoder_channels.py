"""Which channels of a VAE decoder go together, and what is left of them at each resolution.

DepGraph (Torch-Pruning) finds the groups as it does in U-Nets (pruning/channels.py, with its traps). A group lies at
one resolution, which is where its layers write; all groups of a resolution keep the same share of their channels,
those with the largest L2 norm. Outputs of `conv_out` and `time_conv_out` are pixels and stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch_pruning
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from diffusers.models.resnet import AlphaBlender
from torch import Tensor

from vdmini_core.models import IllegalPlan
from vdmini_core.models.decoder import VAEDecoder
from vdmini_core.models.decoder_rows import Follower
from vdmini_core.models.narrow import Kept, parameters_with
from vdmini_core.pruning.channels import (
    INPUTS,
    ChannelGroup,
    Member,
    blender_pruner,
    groups_in,
    importances,
    kept_channels,
    passing_pruner,
    widths_for,
)

NEAR = 0.03
TRACED = 4  # side of the latents that the groups are traced with


@dataclass(frozen=True)
class DecoderChannels:
    """The groups of a decoder's channels, and the resolution of each."""

    decoder: VAEDecoder
    groups: tuple[ChannelGroup, ...]
    levels: tuple[int, ...]

    def counts(self, shares: Sequence[float]) -> list[int]:
        """How many runs of channels stay, group by group, for the share that each resolution keeps.

        IllegalPlan unless there is one share in (0, 1] a resolution.
        """
        wrong = [share for share in shares if not 0 < share <= 1]
        if len(shares) != self.decoder.levels or wrong:
            raise IllegalPlan(
                f"shares of channels are {list(shares)}; expected {self.decoder.levels} above 0 and at most 1, one a "
                "resolution from the latents' to the pixels'"
            )
        return [group.count(shares[level], 0.5) for group, level in zip(self.groups, self.levels, strict=True)]

    def kept(self, shares: Sequence[float]) -> Kept:
        """What stays of every layer, the best channels."""
        return kept_channels(self.decoder.decoder, self.groups, self.counts(shares))

    def widths(self, shares: Sequence[float]) -> dict[str, list[int]]:
        """The list of widths of that, which needs no scores."""
        return widths_for(self.decoder.decoder, self.groups, self.counts(shares))

    def parameters(self, shares: Sequence[float]) -> int:
        """Of the decoder with these shares."""
        return parameters_with(self.decoder.decoder, self.widths(shares))

    def narrowed(self, shares: Sequence[float]) -> VAEDecoder:
        """The VAE with these shares of its decoder's channels; on the meta device any channels will do."""
        if all(share == 1 for share in shares):
            return self.decoder
        return self.decoder.narrowed(self.kept(shares))

    @cached_property
    def whole(self) -> int:
        """Parameters of the decoder as it is."""
        return sum(parameter.numel() for parameter in self.decoder.decoder.parameters())


def decoder_channels(decoder: VAEDecoder) -> DecoderChannels:
    """The groups of a decoder, scored by the L2 norm of all weights of a channel; on the meta device all alike."""
    network, row = decoder.decoder, decoder.row
    device = next(network.parameters()).device
    norm = importances()["depgraph-l2"]

    def score(group: object) -> Tensor:
        if device.type == "meta":
            return torch.zeros(len(group[0].idxs))  # type: ignore[index]
        return norm(group)

    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    for parameter in frozen:  # the graph is traced through autograd
        parameter.requires_grad_(True)
    try:
        latents = torch.zeros(1, network.conv_in.in_channels, 2, TRACED, TRACED, device=device)
        with row.traceable(network), torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                network,
                example_inputs=None,
                forward_fn=lambda *_: row.forward(decoder.model, latents),
                customized_pruners={
                    AlphaBlender: blender_pruner(network),
                    WanRMS_norm: passing_pruner(lambda layer: len(layer.gamma)),  # type: ignore[arg-type]
                },
                verbose=False,
            )
            found = list(groups_in(graph, network, score, row.fixed(network)))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    levels = tuple(_level(decoder, group) for group in found)
    followers = row.followers(network)
    return DecoderChannels(decoder, tuple(_followed(group, followers) for group in found), levels)


def _level(decoder: VAEDecoder, group: ChannelGroup) -> int:
    """Where the layers that write the group's channels lie."""
    levels = {decoder.level_of(member.path) for member in group.members if member.side != INPUTS}
    if len(levels) != 1:
        paths = ", ".join(member.path for member in group.members)
        raise RuntimeError(f"channels of {paths} lie at several resolutions, {sorted(levels)}")
    return levels.pop()


def _followed(group: ChannelGroup, followers: Sequence[Follower]) -> ChannelGroup:
    """The group with the layers that keep the channels of one of its members."""
    members = {(member.path, member.side): member for member in group.members}
    added = []
    for follower in followers:
        leader = members.get((follower.leader, follower.leader_side))
        if leader is not None:
            size = len(leader.own)
            own = torch.cat([leader.own + turn * size for turn in range(follower.times)])
            added.append(Member(follower.path, follower.side, own, leader.shared.repeat(follower.times)))
    return replace(group, members=(*group.members, *added))


def shares_for(channels: DecoderChannels, parameters: int) -> tuple[float, ...]:
    """Shares that leave so many parameters in the decoder: half at the higher resolutions, where the time goes.

    What is still too many goes at the lower ones but the latents' own; where half is too few, more stays. IllegalPlan
    where they come no nearer than NEAR.
    """
    levels = channels.decoder.levels
    high = -(-levels // 2)

    def shares(middle: float, top: float) -> tuple[float, ...]:
        return (1.0, *[middle] * (high - 1), *[top] * (levels - high))

    too_few = channels.parameters(shares(1.0, 0.5)) < parameters
    low, up = (0.5, 1.0) if too_few else (0.02, 1.0)
    of: Callable[[float], tuple[float, ...]] = partial(shares, 1.0) if too_few else lambda share: shares(share, 0.5)
    for _ in range(16):
        half = (low + up) / 2
        low, up = (half, up) if channels.parameters(of(half)) <= parameters else (low, half)
    best = min((of(low), of(up)), key=lambda found: abs(channels.parameters(found) - parameters))
    if abs((found := channels.parameters(best)) / parameters - 1) > NEAR:
        raise IllegalPlan(
            f"{parameters:,} parameters were wanted of the decoder ({decoder_text(channels)}), and fewer channels "
            f"above the latents' resolution come no nearer than {found:,}; set decoder.method to optimal or manual"
        )
    return best


def decoder_text(channels: DecoderChannels) -> str:
    """The decoder's layout and size."""
    return f"{channels.decoder.layout()}, {channels.whole:,}"
