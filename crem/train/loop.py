"""The loop around the step: progress, validation and checkpoints at their intervals, and a stop where it diverges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from crem.config import RunConfig
from crem.data.collator import Batch
from crem.distributed import rank, sum_over_ranks, world_size
from crem.host_memory import give_back_memory
from crem.train.guard import LossGuard
from crem.train.progress import Meter, Progress
from crem.train.step import train_step

__all__ = ["train_loop"]


def train_loop(
    engine: Any,
    batches: Iterator[list[Batch]],
    config: RunConfig,
    *,
    start_step: int,
    device: torch.device,
    on_progress: Callable[[Progress], None],
    on_checkpoint: Callable[[int, Progress], None],
    on_phase: Callable[[int, str], None] = lambda step, phase: None,
    validate: Callable[[int], dict[str, float]] | None = None,
) -> None:
    """Run steps ``start_step`` … ``config.train.steps`` - 1.

    Args:
        batches: this rank's share of each step in its chunks, the first being that of ``start_step``.
        on_progress: called every ``train.log_every`` steps, with every validation and checkpoint, and at the last.
        on_checkpoint: called with the number of finished steps every ``train.checkpoint_every`` steps and at the last.
        on_phase: called with the step and the phase (``crem.train.phases``) that this rank enters.
        validate: called on every rank with the number of finished steps every ``train.validate_every`` steps and at the
            last; returns terms of the held-out rows.

    Raises:
        DivergenceError: a loss is not finite, or exploded.
    """
    engine.train()
    meter = Meter(engine, config, device)
    guard = LossGuard(config.train.explosion_factor, config.optim.warmup_steps)
    for step in range(start_step, config.train.steps):
        on_phase(step, "waiting for rows")
        with meter.waiting():
            chunks = next(batches)
        meter.add(chunks)
        on_phase(step, "forward and backward")
        # dropout is a function of seed, step and rank, so a resumed run draws what it would have drawn
        seed = ((config.train.seed * 1_000_003 + step) * world_size() + rank()) * 65_536 % 2**63

        result = train_step(engine, chunks, config.loss, seed=seed, device=device)

        guard.check(step, result)
        done = step + 1
        checkpoint_due = _due(done, config.train.checkpoint_every, config)
        validation_due = validate is not None and _due(done, config.train.validate_every, config)
        if not (_due(done, config.train.log_every, config) or checkpoint_due or validation_due):
            continue
        progress = meter.progress(done, result)
        if validate is not None and validation_due:
            on_phase(step, "validation")
            progress = replace(progress, validation=validate(done))
        on_progress(progress)
        if checkpoint_due:
            on_phase(step, "checkpoint")
            sum_over_ranks(torch.zeros(1, device=device))  # no rank writes before all have finished the step
            on_checkpoint(done, progress)
        if device.type == "cpu":
            give_back_memory()
        meter.restart()


def _due(done: int, every: int, config: RunConfig) -> bool:
    """Whether something that happens every so many steps happens after ``done`` of them, or after the last."""
    return every > 0 and (done % every == 0 or done == config.train.steps)
