"""What happens around the steps: named callbacks of the loop, each independent of the others.

The loop calls every callback of its list at each event, in the order of the list and on every rank, so a callback may
call collectives. A log interval ends when any of them is due; then each gets the ``Interval`` and decides for itself.
A training run has, in this order: heartbeat, ``LossGuard``, ``Validation``, the best model, ``ProgressReport``,
``CheckpointWriter``. A line of progress thus has the validation of its step and comes before its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crem.config.training import TrainConfig
from crem.train.phases import Phase
from crem.train.progress import Progress

if TYPE_CHECKING:  # the watcher in the driver imports this and needs no model
    from crem.train.step import StepResult

__all__ = ["Callback", "Interval", "ProgressReport", "is_due"]


@dataclass
class Interval:
    """The steps since the last line of progress, when they end."""

    progress: Progress
    """of the interval; ``Validation`` adds its terms for the callbacks after it"""
    enter: Callable[[Phase], None]
    """announces the phase that a callback begins"""


class Callback:
    """Acts at events of the loop. A subclass overrides the events that it acts at."""

    def on_phase(self, step: int, phase: Phase) -> None:
        """This rank enters a phase of step ``step``, counted from 0."""

    def on_step(self, step: int, result: StepResult) -> None:
        """Step ``step`` has been made."""

    def due(self, done: int) -> bool:
        """Whether the interval must end after ``done`` steps; the same on every rank."""
        return False

    def on_interval(self, interval: Interval) -> None:
        """An interval has ended, after ``interval.progress.step`` steps."""


class ProgressReport(Callback):
    """Hands on the figures of every interval; one ends at least every ``train.log_every`` steps.

    Args:
        report: takes the figures, on every rank.
    """

    def __init__(self, config: TrainConfig, report: Callable[[Progress], None]):
        self._config, self._report = config, report

    def due(self, done: int) -> bool:
        return is_due(done, self._config.log_every, self._config.steps)

    def on_interval(self, interval: Interval) -> None:
        self._report(interval.progress)


def is_due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) and after the last happens after ``done``."""
    return every > 0 and (done % every == 0 or done == steps)
