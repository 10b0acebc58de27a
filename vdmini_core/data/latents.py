"""The encode cache: latents and conditions in safetensors shards, read without the VAE in memory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vdmini_core.artifacts import LatentManifest, read_json

SHARD_CLIPS = 128
CONDITION = "condition."


def write_shard(folder: Path, split: str, index: int, tensors: dict[str, Tensor]) -> str:
    """Write one shard and return its file name; every tensor has the clips in its first dimension."""
    name = f"{split}-{index:05d}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, folder / name)
    return name


class LatentCache:
    """Random access to the encoded clips of one split.

    `rows(ids)` gives `latents` [B, C, T, h, w], `labels` [B, 3] (-1: unknown) and the condition's
    tensors under `condition.<name>`.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.manifest = read_json(folder / "latents.json", LatentManifest)
        self._shards = [safe_open(folder / name, "pt") for name in self.manifest.shards[split]]
        self._sizes = [shard.get_slice("labels").get_shape()[0] for shard in self._shards]
        self.keys = sorted(self._shards[0].keys())

    def __len__(self) -> int:
        return sum(self._sizes)

    def rows(self, ids: list[int]) -> dict[str, Tensor]:
        """Stack the given clips."""
        found: dict[str, list[Tensor]] = {key: [] for key in self.keys}
        for clip in ids:
            shard, offset = divmod(clip, SHARD_CLIPS)
            for key in self.keys:
                found[key].append(self._shards[shard].get_slice(key)[offset : offset + 1])
        return {key: torch.cat(parts) for key, parts in found.items()}

    def batches(self, count: int, batch_size: int, first: int = 0) -> Iterator[dict[str, Tensor]]:
        """Clips `first` to `first + count - 1` in order; raises if there are fewer."""
        if first + count > len(self):
            raise ValueError(f"{first + count} clips wanted, {len(self)} encoded; raise encode's clip counts")
        for start in range(first, first + count, batch_size):
            yield self.rows(list(range(start, min(start + batch_size, first + count))))

    def shuffled(self, step: int, batch_size: int, seed: int) -> dict[str, object]:
        """The batch of a training step: epochs of seeded permutations, a function of the step alone."""
        per_epoch = len(self) // batch_size
        if per_epoch == 0:
            raise ValueError(f"batch of {batch_size} from {len(self)} encoded clips; lower the batch size")
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        ids = order[position * batch_size : (position + 1) * batch_size].tolist()
        return {"ids": ids, **self.rows(ids)}


def condition_of(rows: dict[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The condition's tensors of a batch, without their prefix."""
    return {k.removeprefix(CONDITION): v.to(device) for k, v in rows.items() if k.startswith(CONDITION)}
