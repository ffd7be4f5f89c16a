"""The most memory that tensors of a piece of work hold at once.

On CUDA the allocator's own peak above what was allocated before. On CPU every operation is watched
(``TorchDispatchMode``, which sees the backward pass too): a storage counts from the operation that returned it until it
is freed, so parameters, gradients and inputs that were there before do not count. Work space inside an operation is not
seen on CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


def peak_bytes(run: Callable[[], object], held: list[torch.Tensor], device: str = "cpu") -> int:
    """Peak of the bytes that ``run`` holds beyond the ``held`` tensors (those it may write into or give back)."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    live = _Live(held)
    with live:
        run()
    return live.peak


class _Live(TorchDispatchMode):
    def __init__(self, held: list[torch.Tensor]):
        super().__init__()
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in held)
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage in self.known or storage._cdata in given:  # a view, or written in place
                continue
            self.known.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size
