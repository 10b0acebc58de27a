"""Peak memory of one network call, each network alone in a process of its own."""

import multiprocessing
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from vdmini_core.models import Condition, load_denoiser


def peak_memory_bytes(folder: Path, latents: Tensor, condition: Condition) -> int:
    """Peak of loading the denoiser in `folder` and calling it once, in a fresh process.

    On an accelerator its allocator's peak; on the CPU the resident set's rise above what the process
    needed before loading the network (libraries are not counted).
    """
    device = str(latents.device)
    inputs = {name: value.cpu() for name, value in condition.items()}
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload([__name__])  # the libraries are imported once, for every network
    with fresh.Pool(1) as pool:
        return pool.apply(_measure, (folder, device, latents.cpu(), inputs))


def _measure(folder: Path, device: str, latents: Tensor, condition: Condition) -> int:
    before = _resident_peak()
    denoiser = load_denoiser(folder, device)
    moved = {name: value.to(device) for name, value in condition.items()}
    with torch.no_grad():
        denoiser(latents.to(device), torch.zeros(len(latents), device=device), moved)
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return _resident_peak() - before


def _resident_peak() -> int:
    """Largest resident set of this process so far, in bytes.

    On Linux from /proc: getrusage's figure is inherited from the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
