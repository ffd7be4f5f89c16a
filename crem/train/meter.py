"""Counts what a rank computes between two lines of progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from crem.config import RunConfig
from crem.data.collator import Batch
from crem.data.sequence import CutCount
from crem.distributed import sum_over_ranks, world_size
from crem.forecast.devices import peak_flops
from crem.forecast.flops import ModelFlops
from crem.train.progress import Progress
from crem.train.step import StepResult

__all__ = ["Meter"]

log = logging.getLogger(__name__)


class Meter:
    """One rank's counts; reading them is a collective. The peak of the device is looked up or measured once, here."""

    def __init__(self, engine: Any, config: RunConfig, device: torch.device):
        self._engine, self._config, self._device = engine, config, device
        self._flops = ModelFlops.of(engine.module)
        self._peak, source = peak_flops(device, config.train.precision)
        log.info("peak of this rank's %s: %.3g FLOP/s, %s", device, self._peak, source)
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self._tokens = self._useful = self._padding = self._waited = 0.0
        self._steps = self._chunks = 0
        self._cuts = CutCount()
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for rows."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, chunks: Sequence[Batch]) -> None:
        """Count the share of a step that this rank is about to compute, still on the CPU."""
        self._steps += 1
        for chunk in chunks:
            self._chunks += 1
            self._tokens += chunk.tokens
            self._cuts += chunk.cuts
            self._padding += chunk.padding_share
            self._useful += self._flops.of_batch(chunk)

    def progress(self, done: int, result: StepResult) -> Progress:
        """The figures after ``done`` steps; begins a new interval."""
        seconds = time.perf_counter() - self._began
        counts = [
            self._tokens,
            self._useful,
            self._peak,
            self._padding / self._chunks,
            self._waited / seconds,
            self._cuts.cut / self._cuts.sequences,
        ]
        # every backend can sum float32, which is precise enough for rates
        totals = sum_over_ranks(torch.tensor(counts, dtype=torch.float32, device=self._device)).tolist()
        tokens, useful, peak, padding, waited, cut = totals
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
            cut_share=cut / world_size(),
            seconds_left=seconds / self._steps * (self._config.train.steps - done),
        )
        self.restart()
        return progress
