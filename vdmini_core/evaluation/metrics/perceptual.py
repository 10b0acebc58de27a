"""Distances of frames by published networks that not everyone has installed: LPIPS and DreamSim, each an extra."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Distance = Callable[[Tensor, Tensor], Tensor]
"""(frames [N, 3, H, W] in [-1, 1], others) -> [N]; 0 is equal"""


def _lpips(device: torch.device) -> Distance:
    """Zhang et al. 2018 (arXiv 1801.03924), version 0.1 on AlexNet, which is the authors' default."""
    network = _package("lpips").LPIPS(net="alex", verbose=False).to(device).eval()
    return lambda ours, theirs: network(ours, theirs).flatten()


def _dreamsim(device: torch.device) -> Distance:
    """Fu et al. 2023 (arXiv 2306.09344), the ensemble; frames of 224 x 224 pixels in [0, 1]."""
    network, _ = _package("dreamsim").dreamsim(pretrained=True, device=str(device))

    def resized(frames: Tensor) -> Tensor:
        return (F.interpolate(frames, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1) + 1) / 2

    return lambda ours, theirs: network(resized(ours), resized(theirs)).flatten()


PERCEPTUAL: dict[str, Callable[[torch.device], Distance]] = {"lpips": _lpips, "dreamsim": _dreamsim}


def perceptual_distances(names: Iterable[str], device: torch.device) -> dict[str, Distance]:
    """The named distances, ready. They fetch their weights from the network when they are first used.

    ValueError names the extra that is not installed.
    """
    return {name: PERCEPTUAL[name](device) for name in names}


@torch.no_grad()
def perceptual_measures(distances: Mapping[str, Distance], clips: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Each distance of clips [B, 3, T, H, W] in [-1, 1], [B] on the CPU, a mean over frames."""
    ours, theirs = (frames.float().transpose(1, 2).flatten(0, 1) for frames in (clips, teacher))
    found = {name: distance(ours, theirs) for name, distance in distances.items()}
    return {name: value.unflatten(0, (len(clips), -1)).mean(1).float().cpu() for name, value in found.items()}


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"the setting perceptual names {name}, which cannot be imported ({error}); install the extra with "
            f"pip install 'vdmini[{name}]' (it needs a torchvision that fits torch), or take {name} off"
        ) from None
