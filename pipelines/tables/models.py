"""Checkpoints in the workers of a batch job: described before the job starts, loaded once per actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import ray

if TYPE_CHECKING:
    import crem
    from crem.checkpoint import CheckpointInfo

__all__ = ["ModelLoader", "describe_model", "load_model"]

ModelLoader: TypeAlias = Callable[[str, int, int | None], Any]
"""As ``load_model``. What it makes has a ``fingerprint``, a ``dim`` and ``embed_prepared``."""


def describe_model(model: str, *, cpus: float, gpus: float, chorus_tokens: int | None) -> CheckpointInfo:
    """Fingerprint, dimension and chorus tokens of a checkpoint, read where an actor of ``cpus`` and ``gpus`` can run.

    Raises:
        CheckpointError: the checkpoint cannot be read there. ConfigError: it was not trained with so many chorus
            tokens. Both arrive wrapped by Ray: call this inside ``ray_tasks.remote_errors``.
    """
    from crem.checkpoint import describe

    description: CheckpointInfo = ray.get(
        ray.remote(num_cpus=cpus, num_gpus=gpus)(describe).remote(model, chorus_tokens)
    )
    return description


def load_model(model: str, threads: int, chorus_tokens: int | None = None) -> crem.Crem:
    """The checkpoint, with ``threads`` torch threads in this process, at ``chorus_tokens`` (its K where None)."""
    import torch

    import crem

    torch.set_num_threads(threads)
    # a worker without a reserved GPU sees all of them, and must not use the first one that others reserved
    return crem.load(model, device="cuda" if ray.get_gpu_ids() else "cpu", chorus_tokens=chorus_tokens)
