"""How near clips are to others pixel by pixel: PSNR and SSIM of frames, by torchmetrics."""

import torch
from torch import Tensor

MOST_PSNR = 100.0
"""dB: what equal frames are given, whose PSNR is infinite"""


@torch.no_grad()
def pixel_measures(clips: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """`psnr` in dB and `ssim` of each clip, [B] on the CPU, means over frames; clips [B, 3, T, H, W] in [-1, 1].

    On pixels in [0, 1]; SSIM (Wang et al. 2004) with its Gaussian window of 11 x 11 pixels and sigma 1.5, over the
    whole frame, mirrored at its edges (torchmetrics from 1.9 on). PSNR is taken frame by frame, at most MOST_PSNR.
    """
    # Imported where it is used: it takes a second, and every command imports this package.
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    ours, theirs = ((frames.float().transpose(1, 2).flatten(0, 1) + 1) / 2 for frames in (clips, teacher))
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    found = {"psnr": psnr.clamp_max(MOST_PSNR), "ssim": ssim}
    return {name: value.unflatten(0, (len(clips), -1)).mean(1).cpu() for name, value in found.items()}
