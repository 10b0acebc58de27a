"""Refuses a distillation that cannot fit into the device's memory, before anything of it is loaded.

The estimate is the dry run's. With the built-in teacher on a CPU it was 0.97 of the measured peak at the shipped
settings, 0.77 (checkpointing) to 1.05 (batch 16) at others: what is let through may still not fit.
"""

from pathlib import Path

import psutil
import torch

from vdmini_core.data.latents import LatentCache, condition_of
from vdmini_core.distillation.memory import distillation_memory
from vdmini_core.models.published import blueprint
from vdmini_core.settings import DistillSettings
from vdmini_core.training.distributed import clips_at_a_time, process_count

SHARDED = ("student_weights", "discriminator_weights", "gradients", "optimizer", "ema")
"""What FSDP2 shares out among the processes."""


class DoesNotFit(ValueError):
    """The training needs more memory than there is; the message has the figures and the settings to change."""


def needed_memory(
    teacher: Path, removed: tuple[str, ...], data: LatentCache, settings: DistillSettings
) -> dict[str, int]:
    """Bytes by purpose that one process needs, from the teacher folder's configs and the cached latents' shapes."""
    clips = clips_at_a_time(settings.loop)
    row = data.rows([0])
    condition = {name: _of_batch(value, clips) for name, value in condition_of(row).items()}
    denoiser = blueprint(str(teacher)).build()
    student, matches = denoiser.without(removed), denoiser.surviving(removed)
    latents = _of_batch(row["latents"], clips)
    parts = distillation_memory(denoiser, student, matches, settings, latents, condition)
    shares = process_count() if settings.loop.parallel == "fsdp2" else 1
    return {name: size // shares if name in SHARDED else size for name, size in parts.items()}


def _of_batch(row: torch.Tensor, clips: int) -> torch.Tensor:
    return torch.zeros(clips, *row.shape[1:], dtype=row.dtype, device="meta")


def memory_there(device: torch.device) -> int:
    """Bytes of one process: all of a CUDA device, or what the machine and its control group have left for each."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    left = psutil.virtual_memory().available
    limit = group_memory_left(Path("/sys/fs/cgroup"))
    return (left if limit is None else min(left, limit)) // process_count()


def group_memory_left(root: Path) -> int | None:
    """Bytes that the control group (version 2 or 1) still allows, or None without a limit.

    Cached files count as used there, but make room when asked to: those not in use are left out.
    """
    for folder, limit, used, cached in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).is_file() and (text := (folder / limit).read_text().strip()) != "max":
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(facts.get(cached, 0))
            return int(text) - taken
    return None


def check_fits(parts: dict[str, int], there: int, device_name: str, settings: DistillSettings) -> None:
    """Raise DoesNotFit if the parts need more than there is."""
    needed = sum(parts.values())
    if needed <= there:
        return
    shown = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.3g}" for name, size in parts.items())
    fixed = needed - parts["activations"]
    if fixed > there:
        ways = [f"weights and what is trained with them need {fixed / 1e9:.3g} GB alone: take a larger device"]
        if settings.loop.parallel == "ddp":
            ways.append("or share them out among several (distill.loop.parallel: fsdp2)")
    else:
        loop = settings.loop
        ways = [
            f"raise distill.loop.accumulate ({loop.accumulate}) or lower distill.loop.batch_size ({loop.batch_size})"
        ]
        ways += [] if settings.checkpointing else ["set distill.checkpointing to true"]
        ways += [] if loop.precision != "fp32" else ["set distill.loop.precision to bf16"]
    raise DoesNotFit(
        f"distillation needs about {needed / 1e9:.3g} GB of memory ({shown}), and {device_name} has "
        f"{there / 1e9:.3g} GB: {', '.join(ways)}. distill.memory_check: false starts it all the same"
    )
