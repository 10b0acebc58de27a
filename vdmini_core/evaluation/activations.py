"""Bytes of activations that a call would hold on an accelerator, counted without computing anything.

Works on tensors of any device, and is meant for the meta device: what autograd saves for the backward pass
(`saved_storages`), and the most that is alive at once in a pass without one (`peak_bytes`).
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Storages = dict[int, torch.UntypedStorage]
"""Memory blocks by identity; tensors that are views of one another share a block."""

# What torch.autocast does on CUDA in bfloat16, and what in float32, of the operations that the networks use.
LOWERED: set[Any] = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention}
LOWERED |= {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}
RAISED: set[Any] = {F.layer_norm, F.group_norm, F.rms_norm, F.softmax, Tensor.softmax, F.interpolate, F.mse_loss}
RAISED |= {torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp}


class FusedAttention(torch.autograd.Function):
    """What a fused kernel leaves behind: q, k, v, the output and one float32 per query and head, no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        *batch, heads, tokens, _ = q.shape
        output = q.new_empty(*batch, tokens, heads, v.shape[-1]).transpose(-2, -3)  # laid out as the kernels do
        ctx.save_for_backward(q, k, v, mask, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("only counts what is saved")


class AsOnAccelerator(TorchFunctionMode):
    """Within, meta tensors behave as on an accelerator: attention is fused and, if so, autocast to bfloat16.

    The meta device itself has neither: it would materialise the scores, and knows no autocast.
    """

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast and (dtype := _autocast_dtype(func)):
            args, kwargs = tree_map(lambda x: _cast(x, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _autocast_dtype(func: Any) -> torch.dtype | None:
    return torch.bfloat16 if func in LOWERED else torch.float32 if func in RAISED else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-any-return, no-untyped-call]


def storages_of(tensors: Any) -> Storages:
    """The memory blocks of every tensor in a nested structure."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in found}


def total_bytes(storages: Storages) -> int:
    """Bytes of the blocks, each once."""
    return sum(storage.nbytes() for storage in storages.values())


def saved_storages(call: Callable[[], object], weights: Iterable[Tensor]) -> Storages:
    """What autograd keeps for the backward pass of `call()`, without the weights themselves."""
    own, saved = storages_of(list(weights)), Storages()

    def pack(tensor: Tensor) -> Tensor:
        saved.update(storages_of(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return {key: storage for key, storage in saved.items() if key not in own}


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes alive at once of what `call()` allocates."""
    live = _Live()
    with live:
        call()
    return live.peak


class _Live(TorchDispatchMode):
    """Follows every block that an operation returns until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = storages_of((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for key, storage in storages_of(result).items():
            if key not in before and key not in self.known:
                self.known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
