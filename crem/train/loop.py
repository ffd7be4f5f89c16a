"""The loop around the training step. It measures; everything else is a callback (``crem.train.callbacks``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from crem.config import RunConfig
from crem.data.collator import Batch
from crem.distributed import rank, world_size
from crem.host_memory import give_back_memory
from crem.train.callbacks import Callback, Interval
from crem.train.meter import Meter
from crem.train.phases import Phase
from crem.train.step import train_step

__all__ = ["train_loop"]

_STEPS = 1_000_003
"""Above the steps of a run, so that two seeds of a run share no dropout."""
_CHUNKS = 65_536
"""Above the chunks of a rank's share, each of which draws from a seed of its own."""


def train_loop(
    engine: Any,
    batches: Iterator[list[Batch]],
    config: RunConfig,
    callbacks: Sequence[Callback],
    *,
    start_step: int,
    device: torch.device,
) -> None:
    """Run the steps ``start_step`` … ``config.train.steps`` - 1.

    Args:
        engine: DeepSpeed's, or a stand-in with the same methods.
        batches: this rank's share of each step in its chunks, the first being that of ``start_step``.
        callbacks: called in this order.

    Raises:
        DivergenceError: by ``LossGuard``.
    """
    engine.train()
    meter = Meter(engine, config, device)
    for step in range(start_step, config.train.steps):
        enter = partial(_enter, callbacks, step)
        enter(Phase.ROWS)
        with meter.waiting():
            chunks = next(batches)
        meter.add(chunks)

        enter(Phase.COMPUTE)
        result = train_step(engine, chunks, config.loss, seed=_dropout_seed(config.train.seed, step), device=device)
        for callback in callbacks:
            callback.on_step(step, result)

        if any(callback.due(step + 1) for callback in callbacks):
            interval = Interval(meter.progress(step + 1, result), enter)
            for callback in callbacks:
                callback.on_interval(interval)
            if device.type == "cpu":
                give_back_memory()
            meter.restart()


def _enter(callbacks: Sequence[Callback], step: int, phase: Phase) -> None:
    for callback in callbacks:
        callback.on_phase(step, phase)


def _dropout_seed(seed: int, step: int) -> int:
    """Dropout is a function of seed, step and rank, so a resumed run draws what it would have drawn."""
    return ((seed * _STEPS + step) * world_size() + rank()) * _CHUNKS % 2**63
