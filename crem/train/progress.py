"""What is told of a run at each log interval, and the meter that counts it.

Rates, waiting and padding are those of the interval since the last line, summed over all ranks. Losses, learning rate,
gradient norm, uniformity and alignment are those of the interval's last step, whose value does not depend on where the
interval began, so a resumed run repeats it exactly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from crem.config import RunConfig
from crem.data.collator import Batch
from crem.distributed import sum_over_ranks, world_size
from crem.forecast.devices import peak_flops
from crem.forecast.flops import ModelFlops
from crem.train.step import StepResult

__all__ = ["Meter", "Progress"]

log = logging.getLogger(__name__)


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
    temperature: float
    lr: float
    grad_norm: float
    """before clipping"""
    samples_per_s: float
    tokens_per_s: float
    """tokens of the language model, without padding, over all ranks"""
    flops_utilisation: float
    """model FLOPs per second over the peak of all devices (``crem.forecast.flops``)"""
    peak_flops: float
    """FLOP/s of all devices that utilisation is measured by"""
    waiting_share: float
    """share of the time in which ranks waited for their rows"""
    padding_share: float
    seconds_left: float
    validation: dict[str, float] = field(default_factory=dict)
    """terms on held-out rows, where the step was validated"""

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name; those of validation as ``validation/…``."""
        plain = asdict(self)
        return plain | {f"validation/{name}": value for name, value in plain.pop("validation").items()}


class Meter:
    """Counts one rank's work between two lines of progress; reading it is a collective, so every rank must.

    The peak of the device is looked up or measured once, when the meter is made.
    """

    def __init__(self, engine: Any, config: RunConfig, device: torch.device):
        self._engine, self._config, self._device = engine, config, device
        self._flops = ModelFlops.of(engine.module)
        self._peak, source = peak_flops(device, config.train.precision)
        log.info("peak of this rank's %s: %.3g FLOP/s, %s", device, self._peak, source)
        self.restart()

    def restart(self) -> None:
        """Begin an interval now."""
        self._tokens = self._useful = self._padding = self._waited = 0.0
        self._steps = self._chunks = 0
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for rows."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, chunks: Sequence[Batch]) -> None:
        """The share of a step that this rank is about to compute, still on the CPU."""
        self._steps += 1
        for chunk in chunks:
            self._chunks += 1
            self._tokens += chunk.tokens
            self._padding += chunk.padding_share
            self._useful += self._flops.of_batch(chunk)

    def progress(self, done: int, result: StepResult) -> Progress:
        """The line after ``done`` steps; begins a new interval."""
        seconds = time.perf_counter() - self._began
        counts = [self._tokens, self._useful, self._peak, self._padding / self._chunks, self._waited / seconds]
        # single precision holds them well enough for rates, and is what every backend can sum
        totals = sum_over_ranks(torch.tensor(counts, dtype=torch.float32, device=self._device)).tolist()
        tokens, useful, peak, padding, waited = totals
        norm = self._engine.get_global_grad_norm()
        progress = Progress(
            step=done,
            loss=result.loss,
            retrieval=result.retrieval,
            generation=result.generation,
            answer_tokens=result.answer_tokens,
            alignment=result.alignment,
            uniformity=result.uniformity,
            temperature=self._config.loss.temperature,
            lr=float(self._engine.get_lr()[0]),
            grad_norm=float("nan") if norm is None else float(norm),
            samples_per_s=self._config.train.global_batch * self._steps / seconds,
            tokens_per_s=tokens / seconds,
            flops_utilisation=useful / seconds / peak,
            peak_flops=peak,
            waiting_share=waited / world_size(),
            padding_share=padding / world_size(),
            seconds_left=seconds / self._steps * (self._config.train.steps - done),
        )
        self.restart()
        return progress
