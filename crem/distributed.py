"""The few collectives that CREM's losses need; without a process group each is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_rows", "rank", "sum_over_ranks", "world_size"]


def world_size() -> int:
    """Ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, without gradient."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_rows(rows_ND: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [sum of N, ...]; only this rank's own rows carry gradient.

    Ranks may have different numbers of rows. Every rank that computes the same global loss from the result gets the
    exact gradient of its own rows, and the sum over ranks is the gradient of one process with the entire batch.
    """
    ranks = world_size()
    if ranks == 1:
        return rows_ND
    counts = torch.zeros(ranks, dtype=torch.long, device=rows_ND.device)
    counts[rank()] = rows_ND.shape[0]
    dist.all_reduce(counts)
    padded = rows_ND.new_zeros((int(counts.max()), *rows_ND.shape[1:]))
    padded[: rows_ND.shape[0]] = rows_ND.detach()
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    parts = [part[: int(count)] for part, count in zip(parts, counts, strict=True)]
    parts[rank()] = rows_ND
    return torch.cat(parts)
