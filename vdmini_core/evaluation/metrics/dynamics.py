"""What a clip shows without a trained judge: how much moves, how much flickers, how much there is in a frame."""

from itertools import pairwise

import cv2
import numpy as np
import torch
from torch import Tensor

DYNAMICS = ("flow", "flicker", "contrast")
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def dynamics(clips: Tensor) -> Tensor:
    """The three measures named in DYNAMICS of each clip [B, 3, T, H, W] in [-1, 1], as [B, 3] on the CPU.

    ValueError where a clip is too short for a second difference in time, or too small for optical flow.
    """
    if clips.shape[2] < 3 or min(clips.shape[-2:]) < 12:
        raise ValueError(
            f"clips of {clips.shape[2]} frames of {clips.shape[3]} x {clips.shape[4]} pixels; expected at least 3 "
            "frames of 12 x 12 to measure motion and flicker: change data.frames or data.size, or turn validation off"
        )
    return torch.stack([flow(clips), flicker(clips).cpu(), contrast(clips).cpu()], 1).float()


def flow(clips: Tensor) -> Tensor:
    """Mean length of the optical flow from each frame to the next, in pixels a frame, [B]."""
    return flow_lengths(flow_fields(clips))


def flow_lengths(fields: Tensor) -> Tensor:
    """Mean length of the vectors of each clip's flow [B, T - 1, H, W, 2], [B]."""
    return fields.square().sum(-1).sqrt().mean((1, 2, 3))


def flow_fields(clips: Tensor) -> Tensor:
    """Optical flow from each frame to the next, in pixels a frame, [B, T - 1, H, W, 2] on the CPU.

    DIS (Kroeger et al. 2016, arXiv 1603.03590), OpenCV's medium preset, on grey values.
    """
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = torch.einsum("bcthw,c->bthw", clips.float(), torch.tensor(GREY, device=clips.device))
    frames = np.asarray(((grey + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())
    return torch.tensor(np.array([[dis.calc(a, b, None) for a, b in pairwise(clip)] for clip in frames]))


def flicker(clips: Tensor) -> Tensor:
    """Mean absolute second difference in time, |x[t-1] - 2 x[t] + x[t+1]|, [B]; 0 where colours change evenly."""
    return clips.float().diff(n=2, dim=2).abs().mean((1, 2, 3, 4))


def contrast(clips: Tensor) -> Tensor:
    """Standard deviation over a frame's pixels, a mean over channels and frames, [B]; 0 is a solid colour."""
    return clips.float().std((-2, -1), correction=0).mean((1, 2))
