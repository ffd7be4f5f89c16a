"""How far an embedding is: lines in the log, ``progress.jsonl`` in the output, and metrics for Prometheus.

A thread reports while the job runs, whether or not a window was finished meanwhile. Metrics go through Ray's own
exporter (``ray.util.metrics``), so that they stand beside those of the cluster. A report that cannot be written costs
a warning and not the job.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from types import TracebackType
from typing import Literal, TypeAlias

from ray.util.metrics import Gauge

from crem.config import EmbedConfig
from crem.errors import CremError
from pipelines.embedding.output import PROGRESS
from pipelines.embedding.window_embedder import WindowCounts
from pipelines.tables.regular_calls import RegularCalls
from pipelines.tables.storage import Folder

__all__ = ["EmbedProgress", "ProgressEntry", "Stage", "idle_by_thirds", "slowest_stage"]

log = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0
_WRITE_EVERY_S = 30.0
_MOST_LINES = 2000
"""Of the file: beyond them every second of the older half goes."""
_MOST_SAMPLES = 2048
_WORKS = 0.5
"""Share of its time below which no stage that computes holds the others back. Source: ours."""

Stage: TypeAlias = Literal["start", "prepare", "model", "storage"]


@dataclass(frozen=True)
class ProgressEntry:
    """The state of a job at one time."""

    time: str
    """UTC."""
    items: int
    """That are done, with those of earlier runs."""
    of: int
    failed: int
    """Rows with an error that this run found."""
    items_per_s: float
    """Since the last entry, and so are the others."""
    tokens_per_s: float
    busy: float
    """Share of the time in which models computed."""
    slowest: Stage
    """The stage that holds the others back."""
    seconds_left: float | None
    """At the rate of this run; unknown before its first window."""
    cost: float | None
    """Of the accelerators in this run, where ``embed.price_per_hour`` is set."""

    def line(self) -> str:
        """For a person."""
        left = "time left unknown" if self.seconds_left is None else f"about {_duration(self.seconds_left)} left"
        cost = "" if self.cost is None else f", cost {self.cost:.2f}"
        return (
            f"{self.items:,} of {self.of:,} items, {self.failed:,} errors, {self.items_per_s:.0f} items/s, "
            f"{self.tokens_per_s:.0f} tokens/s, models busy {self.busy:.0%}, held back by {self.slowest}, {left}{cost}"
        )


@dataclass
class _Sums:
    """Of the windows that this run has embedded."""

    at_s: float = 0.0
    rows: int = 0
    failed: int = 0
    tokens: int = 0
    device_s: float = 0.0
    prepare_s: float = 0.0


class EmbedProgress(RegularCalls):
    """Counts windows; a context that reports while it is open.

    Args:
        output: gets ``progress.jsonl``.
        items: of the input.
        resumed: items that earlier runs have finished.
        cpus: of the cluster.
    """

    def __init__(self, output: Folder, items: int, resumed: int, config: EmbedConfig, cpus: float):
        super().__init__(_LOG_EVERY_S, "progress")
        self._output, self._items, self._resumed, self._config, self._cpus = output, items, resumed, config, cpus
        self._sums, self._before = _Sums(), _Sums()
        self._samples: list[tuple[float, float]] = [(0.0, 0.0)]
        self._actors: set[str] = set()
        self._began = self._written = time.monotonic()
        self._lines = _earlier_lines(output)
        self._gauges = {
            name: Gauge(f"crem_embed_{name}", description, tag_keys=("output",))
            for name, description in (
                ("items", "items done"),
                ("of", "items of the input"),
                ("failed", "rows with an error"),
                ("items_per_s", "items per second"),
                ("tokens_per_s", "tokens per second"),
                ("busy", "share of the time in which models computed"),
                ("seconds_left", "estimated seconds to the end"),
                ("cost", "cost of the accelerators in this run"),
            )
        }

    def add(self, counts: WindowCounts) -> None:
        """Count a window."""
        sums = self._sums
        self._actors.add(counts.actor)
        self._sums = _Sums(
            time.monotonic() - self._began,
            sums.rows + counts.rows,
            sums.failed + counts.rows - counts.embedded,
            sums.tokens + counts.tokens,
            sums.device_s + counts.device_s,
            sums.prepare_s + counts.prepare_s,
        )
        self._samples.append((self._sums.at_s, self._sums.device_s / len(self._actors)))
        if len(self._samples) > _MOST_SAMPLES:
            self._samples = self._samples[::2]

    def entry(self) -> ProgressEntry:
        """The state now; rates are since the entry before."""
        now, before = self._sums, self._before
        at_s = time.monotonic() - self._began
        seconds, actors = max(at_s - before.at_s, 1e-9), max(1, len(self._actors))
        self._before = _Sums(at_s, now.rows, now.failed, now.tokens, now.device_s, now.prepare_s)
        left = max(0, self._items - self._resumed - now.rows)
        slots = (self._cpus - actors * self._config.cpus_per_actor) / self._config.cpus_per_task
        price = self._config.price_per_hour
        busy = min(1.0, (now.device_s - before.device_s) / (seconds * actors))
        return ProgressEntry(
            time=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
            items=self._resumed + now.rows,
            of=self._items,
            failed=now.failed,
            items_per_s=round((now.rows - before.rows) / seconds, 2),
            tokens_per_s=round((now.tokens - before.tokens) / seconds, 1),
            busy=round(busy, 3),
            slowest=slowest_stage(
                started=now.rows > 0,
                model=busy,
                prepare=(now.prepare_s - before.prepare_s) / (seconds * max(1.0, slots)),
            ),
            seconds_left=round(left * at_s / now.rows, 1) if now.rows else None,
            cost=None if price is None else round(price * actors * at_s / 3600, 4),
        )

    def idle(self) -> tuple[float, float, float]:
        """Share of the time in which the models waited, in the first, middle and last third of the run."""
        return idle_by_thirds(self._samples, time.monotonic() - self._began)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._before = _Sums()  # the last entry is of the whole run
        self._write(self.entry())

    def call(self) -> None:
        """Report the state: to the log and to Ray's metrics, and less often to the output."""
        entry = self.entry()
        log.info("%s", entry.line())
        self._export(entry)
        if time.monotonic() - self._written >= _WRITE_EVERY_S:
            self._write(entry)
            self._written = time.monotonic()

    def _export(self, entry: ProgressEntry) -> None:
        values = asdict(entry)
        for name, gauge in self._gauges.items():
            if values[name] is not None:
                gauge.set(values[name], {"output": self._output.uri})

    def _write(self, entry: ProgressEntry) -> None:
        self._lines.append(json.dumps(asdict(entry)))
        if len(self._lines) > _MOST_LINES:
            half = _MOST_LINES // 2
            self._lines = self._lines[:half:2] + self._lines[half:]
        try:
            self._output.write_bytes(("\n".join(self._lines) + "\n").encode(), PROGRESS)
        except (CremError, OSError) as error:
            log.warning("%s/%s could not be written: %s", self._output.uri, PROGRESS, error)


def slowest_stage(*, started: bool, model: float, prepare: float) -> Stage:
    """The stage that holds the others back, by the shares of their time in which models and tasks that prepare work.

    If neither is busy, windows wait for storage: to be read, or to be written.
    """
    if not started:
        return "start"
    if max(model, prepare) < _WORKS:
        return "storage"
    return "model" if model >= prepare else "prepare"


def idle_by_thirds(samples: list[tuple[float, float]], seconds: float) -> tuple[float, float, float]:
    """Idle shares in three equal parts of the time.

    Args:
        samples: (seconds since the start, busy seconds of a model until then), ascending.
        seconds: of the whole.
    """
    if seconds <= 0:
        return 0.0, 0.0, 0.0
    marks = [_busy_until(samples, seconds * part / 3) for part in range(4)]
    shares = [1 - (later - earlier) / (seconds / 3) for earlier, later in pairwise(marks)]
    first, middle, last = (round(min(1.0, max(0.0, share)), 3) for share in shares)
    return first, middle, last


def _busy_until(samples: list[tuple[float, float]], at_s: float) -> float:
    """By straight lines between the samples."""
    before = (0.0, 0.0)
    for sample in samples:
        if sample[0] >= at_s:
            width = sample[0] - before[0]
            part = (at_s - before[0]) / width if width > 0 else 1.0
            return before[1] + part * (sample[1] - before[1])
        before = sample
    return before[1]


def _earlier_lines(output: Folder) -> list[str]:
    """Of the runs before; none if the file is damaged."""
    if not output.exists(PROGRESS):
        return []
    return output.read_bytes(PROGRESS).decode(errors="replace").splitlines()[-_MOST_LINES:]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "long"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 3 else f"{hours:.1f} h"
