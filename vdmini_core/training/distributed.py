"""Several processes train one model: who takes which clips, how gradients meet, and what is put together again.

`accelerate launch` starts the processes and tasks/ joins them with accelerate's `PartialState`. What happens to a
network is torch's own: accelerate's DDP hides it in a wrapper, which taps and surgery look into, and its FSDP2
takes a single model with its optimizer, where two players alternate. Here DDP wraps a player's loss and
`fully_shard` works in place, so a network stays what it is. Without a process group there is one process.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vdmini_core.settings import LoopSettings

State = dict[str, Any]
Batch = dict[str, Any]
Losses = dict[str, Tensor]


def process_count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_index() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that logs and writes."""
    return process_index() == 0


def clips_at_a_time(settings: LoopSettings) -> int:
    """Clips of one micro-batch; ValueError where the batch cannot be shared out evenly."""
    count, rest = divmod(settings.batch_size, settings.accumulate * process_count())
    if rest:
        raise ValueError(
            f"loop.batch_size is {settings.batch_size}, the clips of a step in all processes together; expected a "
            f"multiple of loop.accumulate x processes = {settings.accumulate} x {process_count()}: change "
            "loop.batch_size or loop.accumulate"
        )
    return count


def micro_batches(batch: Batch, settings: LoopSettings) -> Iterator[Batch]:
    """This process's clips of the global batch, in `accumulate` equal parts."""
    size = clips_at_a_time(settings)
    for part in range(settings.accumulate):
        first = (process_index() * settings.accumulate + part) * size
        yield {name: values[first : first + size] for name, values in batch.items()}


class _Turn(nn.Module):
    """A player's loss as the forward of a module that holds its weights and no other player's, as DDP wants it."""

    def __init__(self, module: nn.Module, loss: Callable[[State], Losses]) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, state: State) -> Losses:
        return self.loss(state)


def joined(module: nn.Module, loss: Callable[[State], Losses], settings: LoopSettings) -> Callable[[State], Losses]:
    """`loss` such that its backward pass leaves the gradient of its mean over all processes, on `module`.

    Under FSDP2 `module` is sharded in place: its parameters become DTensors, to be given to an optimizer afterwards.
    """
    if process_count() == 1:
        return loss
    if settings.parallel == "fsdp2":
        _shard(module)
        return loss
    module.requires_grad_(True)  # DDP averages what requires a gradient now
    # Unused weights are searched for because some classes have weights that a call leaves out.
    return DistributedDataParallel(_Turn(module, loss), forward_sync_buffers=False, find_unused_parameters=True)


def _shard(module: nn.Module) -> None:
    """Share the weights out, every block of the module's lists (stages, transformer blocks, heads) as one piece."""
    mesh = init_device_mesh(next(module.parameters()).device.type, (process_count(),))
    blocks = [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh)


@contextmanager
def averaging(module: nn.Module, turn: Callable[[State], Losses], *, now: bool) -> Iterator[None]:
    """Within the context backward passes average gradients over processes `now`, or leave that to a later one."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)
    if isinstance(turn, DistributedDataParallel) and not now:
        with turn.no_sync():
            yield
    else:
        yield


def means(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars of every process, averaged over processes."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if process_count() > 1:
        distributed.all_reduce(stacked)
        stacked /= process_count()
    return dict(zip(values, stacked.tolist(), strict=True))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether it is true in any process."""
    return any(_values(int(flag), device))


def of_main(value: int, device: torch.device) -> int:
    """What it is in the main process."""
    return _values(value, device)[0]


def check_same(value: int, what: str, device: torch.device) -> None:
    """ValueError where the processes differ in it."""
    if len(set(found := _values(value, device))) > 1:
        raise ValueError(f"{what} differs between processes: {', '.join(map(str, found))}; let all see the same disk")


def of_all(texts: list[str]) -> list[str]:
    """The texts of all processes, in their order."""
    found = [texts] * process_count()
    if process_count() > 1:
        distributed.all_gather_object(found, texts)
    return [text for part in found for text in part]


def _values(value: int, device: torch.device) -> list[int]:
    """What it is in every process, on a device that the process group can reach."""
    found = torch.zeros(process_count(), dtype=torch.int64, device=device)
    found[process_index()] = value
    if process_count() > 1:
        distributed.all_reduce(found)
    return found.tolist()


def wait_for_all() -> None:
    """Return when every process has come here."""
    if process_count() > 1:
        distributed.barrier()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with its shards put together; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whole, sharded ones on the CPU, one after the other; nothing in other processes than the main one."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if is_main():
            found[name] = complete.cpu() if complete is not tensor else tensor
    return found


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
