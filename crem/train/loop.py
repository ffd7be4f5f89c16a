"""The loop around the step: logging and checkpoints at their intervals, nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from crem.config import RunConfig
from crem.data.collator import Batch
from crem.distributed import rank, sum_over_ranks, world_size
from crem.errors import TrainingError
from crem.train.step import train_step

__all__ = ["Progress", "train_loop"]


@dataclass(frozen=True)
class Progress:
    """One line of metrics; all terms are those of the global batch."""

    step: int
    loss: float
    retrieval: float
    generation: float
    answer_tokens: int
    alignment: float
    uniformity: float
    lr: float
    grad_norm: float
    samples_per_s: float
    padding_share: float
    seconds_left: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name."""
        return asdict(self)


def train_loop(
    engine: Any,
    batches: Iterator[list[Batch]],
    config: RunConfig,
    *,
    start_step: int,
    device: torch.device,
    on_progress: Callable[[Progress], None],
    on_checkpoint: Callable[[int, Progress], None],
) -> None:
    """Run steps ``start_step`` … ``config.train.steps`` - 1.

    Args:
        batches: this rank's share of each step in its chunks, the first being that of ``start_step``.
        on_progress: called every ``train.log_every`` steps and at the last.
        on_checkpoint: called with the number of finished steps every ``train.checkpoint_every`` steps and at the last.

    Raises:
        TrainingError: a loss is not finite.
    """
    engine.train()
    last_time, last_step = time.perf_counter(), start_step
    for step in range(start_step, config.train.steps):
        # dropout is a function of seed, step and rank, so a resumed run draws what it would have drawn
        seed = ((config.train.seed * 1_000_003 + step) * world_size() + rank()) * 65_536 % 2**63
        chunks = [chunk.to(device) for chunk in next(batches)]
        result = train_step(engine, chunks, config.loss, seed=seed)
        if not torch.isfinite(torch.tensor(result.loss)):
            raise TrainingError(
                f"the loss of step {step} is {result.loss} (retrieval {result.retrieval}, generation "
                f"{result.generation}); lower optim.lr or raise loss.temperature, and resume from the last checkpoint"
            )
        done = step + 1
        final = done == config.train.steps
        checkpoint_due = done % config.train.checkpoint_every == 0 or final
        if not (done % config.train.log_every == 0 or checkpoint_due):
            continue
        now = time.perf_counter()
        per_step = (now - last_time) / (done - last_step)
        last_time, last_step = now, done
        progress = Progress(
            step=done,
            loss=result.loss,
            retrieval=result.retrieval,
            generation=result.generation,
            answer_tokens=result.answer_tokens,
            alignment=result.alignment,
            uniformity=result.uniformity,
            lr=float(engine.get_lr()[0]),
            grad_norm=_norm(engine),
            samples_per_s=config.train.global_batch / per_step,
            padding_share=sum(chunk.padding_share for chunk in chunks) / len(chunks),
            seconds_left=per_step * (config.train.steps - done),
        )
        on_progress(progress)
        if checkpoint_due:
            sum_over_ranks(torch.zeros(1, device=device))  # no rank writes before all have finished the step
            on_checkpoint(done, progress)
            last_time = time.perf_counter()


def _norm(engine: Any) -> float:
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)
