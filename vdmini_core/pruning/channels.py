"""Channel pruning, the baselines of the paper's Table 3: dependency graph and importances are Torch-Pruning's.

DepGraph (arXiv 2301.12900) finds which channels have to go together; each group of them loses an equal share of its
least important ones. What Torch-Pruning 1.6.1 cannot do with a spatio-temporal U-Net, and what is done instead:

- `AlphaBlender`, which mixes the spatial and the temporal path after every ResBlock and in every transformer: its
  scalar `mix_factor` is no layer, and where widths meet in a skip concatenation the library walks back through the
  residual stream to find them, twice as many ways at each blend, until its recursion limit: TypeError. A pruner of
  our own tells it the width.
- `GroupNorm` with 32 groups: it takes the same number of channels out of every group, so a width of 64 can only be
  halved and one of 32 not pruned. Here whole normalisation groups go, and their number (`num_groups`) falls with them:
  what is left is normalised as before, but where skip concatenations are normalised their groups shift. As streams of
  different width meet in these, all keep the same share of groups.
- `GEGLU` splits its projection in halves that go together: asked for a quarter of the outputs, the library takes nearly
  half. The group is ranked from the layer behind, which has one input a pair.
- `Downsample2D` and `Upsample2D` compare their input with a width that they noted: the forward pass fails after
  pruning. models/narrow.py renews such notes.
- Attention: heads keep equal sizes, each losing its own least important dimensions; none goes as a whole.

The rest works as it is: 3D convolutions, the reshapes of frames into batch and back (no channel moves), time embedding
projections, transformers' inner streams, skip concatenations. `conv_out` stays. Attention scales its logits by the
size of the heads that are left, as diffusers does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import AlphaBlender, SpatioTemporalResBlock
from torch import Tensor, nn

from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.diffusion.process import Process, like
from vdmini_core.models import Condition, Denoiser, UNetDenoiser
from vdmini_core.models.narrow import NORMS, Kept, parameters_with, width_of

TOLERANCE = 0.01
"""Networks whose parameters differ by less count as equal in size."""
CALIBRATION_CLIPS, CALIBRATION_BATCH = 32, 4
INPUTS = 1  # index of the inputs in `Kept`; outputs and norms are 0


@dataclass(frozen=True)
class Member:
    """One side of a layer in a group: its channels `own` are the group's channels `shared`, one by one."""

    path: str
    side: int
    own: Tensor
    shared: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that have to go together wherever they appear; `scores` [C], a higher one is more important.

    They go in runs of `run` neighbours (a normalisation group), and as many from each of `heads` equal parts.
    `normalised`: a GroupNorm reads them.
    """

    scores: Tensor
    members: tuple[Member, ...]
    run: int
    heads: int
    normalised: bool

    def count(self, share: float, phase: float) -> int:
        """How many runs of each head stay if `share` of them do: rounded up where the fraction is above 1 - `phase`."""
        runs = len(self.scores) // (self.heads * self.run)
        return min(max(int(share * runs + phase), 1), runs)

    def best(self, count: int) -> Tensor:
        """Indices of the channels that stay, in order: of each head the `count` best runs."""
        runs = self.scores.reshape(self.heads, -1, self.run).mean(2)
        chosen = runs.topk(count, dim=1).indices + torch.arange(self.heads)[:, None] * runs.shape[1]
        return (chosen.reshape(-1, 1) * self.run + torch.arange(self.run)).flatten().sort().values


def counts_for(groups: Sequence[ChannelGroup], share: float, streams: float) -> list[int]:
    """How many runs of each head stay, group by group, if they keep `share`, those under a GroupNorm `streams`.

    The fraction that a share leaves is rounded up in some groups and down in others, evenly along the network, so that
    its size changes smoothly with the share. Under GroupNorms all round alike, as they meet in concatenations.
    """
    return [
        group.count(streams, 0.5) if group.normalised else group.count(share, (index + 0.5) / len(groups))
        for index, group in enumerate(groups)
    ]


def widths_for(model: nn.Module, groups: Sequence[ChannelGroup], counts: Sequence[int]) -> dict[str, list[int]]:
    """The list of widths if so many runs of each head stay."""
    widths: dict[str, list[int]] = {}
    for group, count in zip(groups, counts, strict=True):
        gone = len(group.scores) - group.heads * group.run * count
        for member in group.members:
            if member.path not in widths:
                widths[member.path] = width_of(model.get_submodule(member.path))
            widths[member.path][member.side] -= gone * len(member.own) // len(group.scores)
    return widths


def kept_channels(model: nn.Module, groups: Sequence[ChannelGroup], counts: Sequence[int]) -> Kept:
    """What stays of every layer if so many runs of each head stay, the best of them."""
    stays: dict[str, list[Tensor]] = {}
    for group, count in zip(groups, counts, strict=True):
        gone = torch.ones(len(group.scores), dtype=torch.bool)
        gone[group.best(count)] = False
        for member in group.members:
            if member.path not in stays:
                sizes = width_of(model.get_submodule(member.path))
                stays[member.path] = [torch.ones(size, dtype=torch.bool) for size in sizes]
            stays[member.path][member.side][member.own[gone[member.shared]]] = False
    return {path: tuple(side.nonzero().flatten() for side in sides) for path, sides in stays.items()}


def channels_for(model: nn.Module, groups: Sequence[ChannelGroup], parameters: int) -> Kept:
    """What stays if the model is to have so many parameters, all groups keeping about the same share.

    ValueError where that cannot be met within 1%.
    """

    def count(share: float, streams: float) -> int:
        return parameters_with(model, widths_for(model, groups, counts_for(groups, share, streams)))

    streams = _bisect(lambda share: count(share, share), parameters)
    share = _bisect(lambda share: count(share, streams), parameters)
    found = count(share, streams)
    if abs(found / parameters - 1) > TOLERANCE:
        raise ValueError(
            f"{parameters:,} parameters were wanted, and channel pruning of {type(model).__name__} gets no nearer than "
            f"{found:,}; choose a plan that removes less"
        )
    return kept_channels(model, groups, counts_for(groups, share, streams))


def _bisect(count: Callable[[float], int], wanted: int, steps: int = 14) -> float:
    """The share in [0, 1] whose count, which rises with it, is nearest to the one that is wanted."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) <= wanted else (low, middle)
    return min((low, high), key=lambda share: abs(count(share) - wanted))


def tapped_channels(denoiser: Denoiser, kept: Kept) -> dict[str, tuple[int, ...]]:
    """Unit -> the teacher's channels that its feature still has, for features that lost some.

    A unit's feature comes out of the last layer of its tapped part that writes to the residual stream.
    """
    found = {}
    parts: dict[str, Any] = denoiser.tap_modules()
    for name, module in parts.items():
        last = module.temporal_res_block.conv2 if isinstance(module, SpatioTemporalResBlock) else module.proj_out
        path = next(path for path, candidate in denoiser.model.named_modules() if candidate is last)
        if path in kept and len(kept[path][0]) < width_of(last)[0]:
            found[name] = tuple(kept[path][0].tolist())
    return found


def importances() -> dict[str, Callable[[Any], Tensor]]:
    """How channels are scored, by name.

    `magnitude` is the L2 norm of the group's first layer alone (Li et al., arXiv 1608.08710), `depgraph-l2` that of all
    its layers, `depgraph-taylor` the first-order change of the loss (Molchanov et al., arXiv 1906.10771) of all.
    """
    library = torch_pruning.importance
    return {
        "magnitude": library.GroupMagnitudeImportance(p=2, group_reduction="first"),
        "depgraph-l2": library.GroupMagnitudeImportance(p=2),
        "depgraph-taylor": library.GroupTaylorImportance(),
    }


CRITERIA = ("magnitude", "depgraph-l2", "depgraph-taylor")


def channel_groups(
    denoiser: Denoiser, latents: Tensor, condition: Condition, criterion: str
) -> tuple[ChannelGroup, ...]:
    """The groups of a spatio-temporal U-Net with their scores; `depgraph-taylor` reads the gradients that are there.

    `latents` [B, C, T, h, w] and `condition` are any that the network takes.
    """
    model = denoiser.model
    score = importances()[criterion]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:  # the graph is traced through autograd
        parameter.requires_grad_(True)
    try:
        time = torch.full((len(latents),), 0.3, device=latents.device)
        graph = torch_pruning.DependencyGraph().build_dependency(
            model,
            example_inputs=None,
            forward_fn=lambda network, _: denoiser(latents, time, condition),
            customized_pruners={AlphaBlender: blender_pruner(model)},
            verbose=False,
        )
        return tuple(groups_in(graph, model, score, [model.conv_out]))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def blender_pruner(model: nn.Module) -> Any:
    """Tells Torch-Pruning how wide an AlphaBlender is, which has no channels of its own to prune."""
    modules: list[Any] = list(model.modules())
    owners = {module.time_mixer: module for module in modules if hasattr(module, "time_mixer")}

    def width(layer: nn.Module) -> int:
        owner = owners[layer]
        if isinstance(owner, SpatioTemporalResBlock):
            return int(owner.temporal_res_block.conv2.out_channels)
        return int(owner.proj_out.in_features)

    return passing_pruner(width)


def passing_pruner(width: Callable[[nn.Module], int]) -> Any:
    """Tells Torch-Pruning of layers that it does not know, which pass so many channels on."""

    class PassingPruner(torch_pruning.BasePruningFunc):
        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> int:
            return width(layer)

        get_in_channels = get_out_channels

    return PassingPruner()


def groups_in(
    graph: Any, model: nn.Module, score: Callable[[Any], Tensor], fixed: Sequence[nn.Module]
) -> Iterator[ChannelGroup]:
    """Torch-Pruning's groups with their scores, all but those of the outputs of `fixed` layers."""
    paths = {module: path for path, module in model.named_modules()}
    heads = {
        layer: module.heads
        for module in model.modules()
        if isinstance(module, Attention)
        for layer in (module.to_q, module.to_k, module.to_v)
    }
    roots = [nn.Conv2d, nn.Conv3d, nn.Linear]
    for group in graph.get_all_groups(ignored_layers=list(fixed), root_module_types=roots):
        smallest = min(group, key=lambda item: len(item.idxs))
        if len(smallest.idxs) < len(group[0].idxs):
            group = graph.get_pruning_group(smallest.dep.target.module, smallest.dep.handler, smallest.idxs)
        members, run, parts = [], 1, 1
        for item in group:
            module = item.dep.target.module
            if module not in paths or not isinstance(module, (*NORMS, nn.Linear, nn.Conv2d, nn.Conv3d)):
                continue
            norm = isinstance(module, NORMS)
            side = 0 if norm or graph.is_out_channel_pruning_fn(item.dep.handler) else INPUTS
            members.append(Member(paths[module], side, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
            if isinstance(module, nn.GroupNorm):
                run = len(group[0].idxs) // module.num_groups
            if module in heads and side != INPUTS:
                parts = heads[module]
        normalised = any(isinstance(model.get_submodule(member.path), nn.GroupNorm) for member in members)
        yield ChannelGroup(score(group).detach().cpu(), tuple(members), run, parts, normalised)


def accumulate_gradients(denoiser: Denoiser, process: Process, data: LatentCache, seed: int, sigma: float) -> None:
    """Leave in the network's parameters the gradients of the denoising loss over the first clips of the cache.

    Levels are log-normal with mean 0 and deviation `sigma`; noise and levels follow from the seed.
    """
    model, generator = denoiser.model, torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.requires_grad_(True)
    for rows in data.batches(min(CALIBRATION_CLIPS, len(data)), CALIBRATION_BATCH):
        x0 = rows["latents"]
        noise = torch.randn(x0.shape, generator=generator)
        level = process.draw(len(x0), 0.0, sigma, generator)
        noisy = process.noised(x0, noise, level).to(device)
        answer = denoiser(noisy, process.time(level).to(device), condition_of(rows, device))
        error = (answer - process.target(x0, noise, level).to(device)).square()
        (error * like(process.velocity_weight(level).to(device), error)).mean().backward()
    model.requires_grad_(False)


def prune_channels(
    denoiser: Denoiser, criterion: str, parameters: int, data: LatentCache, process: Process, seed: int = 0
) -> tuple[UNetDenoiser, dict[str, tuple[int, ...]]]:
    """A network of so many parameters within 1%, and the teacher's channels that its units' features still have.

    `data` are training clips, on which `depgraph-taylor` is measured. ValueError for a network that this was not
    worked out for.
    """
    if not isinstance(denoiser, UNetDenoiser) or not any(isinstance(m, AlphaBlender) for m in denoiser.model.modules()):
        raise ValueError(
            f"channel pruning is worked out for UNetSpatioTemporalConditionModel; {type(denoiser.model).__name__} "
            "has other layers"
        )
    rows = data.rows([0])
    device = next(denoiser.model.parameters()).device
    if criterion == "depgraph-taylor":
        accumulate_gradients(denoiser, process, data, seed, sigma=1.4)
    groups = channel_groups(denoiser, rows["latents"].to(device), condition_of(rows, device), criterion)
    denoiser.model.zero_grad(set_to_none=True)
    kept = channels_for(denoiser.model, groups, parameters)
    return denoiser.narrowed(kept), tapped_channels(denoiser, kept)
