"""How far a run of ``crem synthesise`` is, in a line of its log from time to time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from crem.config import SynthesiseConfig
from pipelines.synthesis.meter import MeterReading, Spent

__all__ = ["cost_text", "progress", "progress_line"]

log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


@contextmanager
def progress(meter: ray.actor.ActorHandle, rows: int, settings: SynthesiseConfig) -> Iterator[None]:
    """Log what the meter says from time to time; a shard can take minutes."""
    stopped, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not stopped.wait(_LOG_EVERY_S):
            reading = ray.get(meter.reading.remote())
            log.info("%s", progress_line(reading, rows, time.monotonic() - began, settings))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        log.info("%s", progress_line(ray.get(meter.reading.remote()), rows, time.monotonic() - began, settings))


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
