"""The driver's side of a running training: it writes metrics and the report, and logs progress for a person to read."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from ray.util.queue import Empty, Queue

from crem.config import PromptConfig, RunConfig
from crem.train.progress import Progress, ValidationResult
from pipelines.tables.storage import Folder
from pipelines.training.held_out import DataMixRow
from pipelines.training.messages import Exported, Message, Resumed, WorkerWarning
from pipelines.training.metrics_log import MetricsLog
from pipelines.training.trackers import Tracker

if TYPE_CHECKING:  # it draws charts
    from pipelines.reports.training_page import MetricEntry

__all__ = ["Follower", "cuts_line", "duration", "progress_line"]

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 60.0
"""Drawing the page takes the driver about a second."""


def duration(seconds: float) -> str:
    """For a person to read: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def progress_line(p: Progress, steps: int) -> str:
    """One log interval for the terminal; losses are those of its last step, rates those of the interval."""
    tokens = f"{p.tokens_per_s / 1000:.1f}k" if p.tokens_per_s >= 1000 else f"{p.tokens_per_s:.0f}"
    return (
        f"step {p.step}/{steps}  loss {p.loss:.3f} (retrieval {p.retrieval:.3f}, generation {p.generation:.3f})  "
        f"lr {p.lr:.1e}  grad {p.grad_norm:.2f}  {p.samples_per_s:.0f} samples/s  {tokens} tokens/s  "
        f"MFU {100 * p.flops_utilisation:.1f} %  {duration(p.seconds_left)} left"
    )


def _validation_line(step: int, v: ValidationResult) -> str:
    return (
        f"step {step} validated: loss {v.loss:.3f}  retrieval {v.retrieval:.3f}  P@1 {100 * v.precision_at_1:.1f} %  "
        f"generation {v.generation_native:.3f} native, {v.generation_compressed:.3f} compressed"
    )


def cuts_line(entries: Sequence[MetricEntry], prompt: PromptConfig) -> str | None:
    """What share of the sequences lost the end of a text, over the steps of all entries; ``None`` where none did."""
    cut = done = 0.0
    for entry in entries:
        step = entry["step"] or 0.0
        cut += (step - done) * (entry.get("cut_share") or 0.0)
        done = step
    if not cut:
        return None
    return (
        f"in {done:.0f} steps {100 * cut / done:.2g} % of the sequences lost the end of a text "
        f"(model.prompt.max_text_tokens={prompt.max_text_tokens}, max_answer_tokens={prompt.max_answer_tokens}); "
        "raise the limit or shorten the texts"
    )


class Follower:
    """Receives the workers' messages in a thread of the driver. On leaving it finishes metrics and report, also if the
    run failed.

    Attributes:
        last: the latest progress of this start.
        exported: what rank 0 reported at the end; ``None`` before.
    """

    def __init__(
        self,
        queue: Queue,
        run: Folder,
        config: RunConfig,
        *,
        mix: list[DataMixRow],
        fresh: bool,
        tracker: Tracker | None = None,
    ):
        self._queue, self._run, self._config, self._mix = queue, run, config, mix
        self._metrics = MetricsLog(run, fresh=fresh, tracker=tracker)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="crem-follower")
        self._began = self._drawn = time.monotonic()
        self._cuts_said = False
        self.last: Progress | None = None
        self.exported: Exported | None = None

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        try:
            self._metrics.close(failed=error is not None)
        except Exception:  # as in ``_on_progress``
            log.warning("the last metrics could not be written", exc_info=True)
        self._queue.shutdown()
        self._say_cuts()
        self._draw("complete" if error is None else f"failed: {error or type(error).__name__}")

    def _listen(self) -> None:
        while True:
            try:
                message = self._queue.get(timeout=0.5)
            except Empty:
                if self._stop.is_set():
                    return
                continue
            self._on_message(message)

    def _on_message(self, message: Message) -> None:
        match message:
            case WorkerWarning(text):
                log.warning("%s", text)
            case Resumed(step, workers):
                log.info("resuming at step %d (%d workers)", step, workers)
            case Exported():
                self.exported = message
            case Progress():
                self._on_progress(message)

    def _on_progress(self, p: Progress) -> None:
        self.last = p
        try:
            self._metrics.write(p)
        except Exception:  # a run does not end because a metric could not be written
            log.warning("the metrics of step %d could not be written", p.step, exc_info=True)
        log.info("%s", progress_line(p, self._config.train.steps))
        if p.cut_share and not self._cuts_said:  # at the first line, while a run may still be stopped
            self._cuts_said = True
            self._say_cuts()
        if p.validation is not None:
            log.info("%s", _validation_line(p.step, p.validation))
        if time.monotonic() - self._drawn > _REPORT_EVERY_S:
            self._draw("running")

    def _say_cuts(self) -> None:
        if (line := cuts_line(self._metrics.entries, self._config.model.prompt)) is not None:
            log.warning("%s", line)

    def _draw(self, state: str) -> None:
        from pipelines.reports.training_page import write_training_report

        self._drawn = time.monotonic()
        try:
            write_training_report(
                self._run,
                self._config,
                self._metrics.entries,
                mix=self._mix,
                state=state,
                seconds=self._drawn - self._began,
                result=self.exported,
            )
        except Exception:  # nor because its page could not
            log.warning("report.html could not be written", exc_info=True)
