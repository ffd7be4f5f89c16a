"""Loading a checkpoint in a worker of a batch job."""

from __future__ import annotations

from typing import Any

import ray

__all__ = []


def load_model(model: str, threads: int, chorus_tokens: int | None = None) -> Any:
    """The checkpoint, with ``threads`` torch threads in this process, at ``chorus_tokens`` (its K where None)."""
    import torch

    import crem

    torch.set_num_threads(threads)
    # a worker without a reserved GPU sees all of them, and must not crowd onto the first
    return crem.load(model, device="cuda" if ray.get_gpu_ids() else "cpu", chorus_tokens=chorus_tokens)
