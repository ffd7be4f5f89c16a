"""Where a rank can be in a run. Apart from the loop, because the watcher in the driver needs the names and no torch."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Phase"]


class Phase(StrEnum):
    """What the main thread of a rank is doing. The loop and the worker announce it, the watcher compares it."""

    STARTING = "starting"
    ROWS = "waiting for rows"
    COMPUTE = "forward and backward"
    VALIDATION = "validation"
    CHECKPOINT = "checkpoint"
    EXPORT = "export"
    FINISHED = "finished"

    @property
    def order(self) -> int:
        """Its place in a step; 0 for a phase outside of the steps."""
        return _OF_A_STEP.index(self) if self in _OF_A_STEP else 0

    @property
    def has_time_limit(self) -> bool:
        """Whether staying in it for long is a fault. Starting and writing files may take as long as they need."""
        return self not in (Phase.STARTING, Phase.CHECKPOINT, Phase.EXPORT, Phase.FINISHED)


_OF_A_STEP = (Phase.ROWS, Phase.COMPUTE, Phase.VALIDATION, Phase.CHECKPOINT)
