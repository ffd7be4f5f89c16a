"""How far a run of ``crem synthesise`` is, in a line of its log from time to time."""

from __future__ import annotations

import logging
import time
from types import TracebackType

import ray

from crem.config import SynthesiseConfig
from pipelines.synthesis.meter import MeterReading, Spent
from pipelines.tables.regular_calls import RegularCalls

__all__ = ["AskingProgress", "cost_text", "progress_line"]

log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


class AskingProgress(RegularCalls):
    """Logs what the meter says; a shard can take minutes."""

    def __init__(self, meter: ray.actor.ActorHandle, rows: int, settings: SynthesiseConfig):
        super().__init__(_LOG_EVERY_S, "progress")
        self._meter, self._rows, self._settings = meter, rows, settings
        self._began = time.monotonic()

    def call(self) -> None:
        """Log the state."""
        reading = ray.get(self._meter.reading.remote())
        log.info("%s", progress_line(reading, self._rows, time.monotonic() - self._began, self._settings))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.call()


def progress_line(reading: MeterReading, rows: int, seconds: float, settings: SynthesiseConfig) -> str:
    """The state of a run that has lasted ``seconds`` and has at most ``rows`` rows to ask about."""
    rate = reading.rows / seconds
    left = f"{(rows - reading.rows) / rate / 60:.0f} min left at most" if rate else "no answer yet"
    return (
        f"{reading.rows} of at most {rows} rows asked about, {reading.failed} without a valid answer, "
        f"{rate:.1f} rows/s, {reading.spent.tokens} tokens{cost_text(reading.spent, settings)}, "
        f"{reading.in_flight} in flight, {reading.busy} times busy, {left}"
    )


def cost_text(spent: Spent, settings: SynthesiseConfig) -> str:
    """The cost, for the end of a list; empty where no prices are given."""
    return f", cost {spent.cost(settings):.2f}" if settings.input_price or settings.output_price else ""
