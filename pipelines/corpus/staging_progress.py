"""How far the staging is: a line in the log every ten seconds, whether or not a piece was finished in them."""

from __future__ import annotations

import logging
import time

from pipelines.corpus.staging import PieceCounts
from pipelines.tables.regular_calls import RegularCalls

__all__ = ["StagingProgress"]

log = logging.getLogger(__name__)

_EVERY_S = 10.0


class StagingProgress(RegularCalls):
    """Counts pieces that are staged; a context that reports while it is open.

    Args:
        records: of the corpus.
        earlier: records of pieces that an interrupted run staged.
    """

    def __init__(self, records: int, earlier: int = 0):
        super().__init__(_EVERY_S, "progress")
        self._records, self._earlier = records, earlier
        self.done = self.rows = self.rejected = self.images = 0
        self._began = time.monotonic()

    def add(self, counts: PieceCounts) -> None:
        """Count a piece."""
        self.done += counts.records
        self.rows += counts.rows_in
        self.rejected += counts.rejected
        self.images += counts.images

    def line(self, seconds: float) -> str:
        """The state after so many seconds."""
        done = self._earlier + self.done
        rate = self.done / max(seconds, 1e-9)
        left = f"{(self._records - done) / rate:.0f} s left" if self.done else "time left unknown"
        return (
            f"{done:,} of {self._records:,} records ({done / max(1, self._records):.0%}), {rate:.0f} records/s, "
            f"{self.images / max(seconds, 1e-9):.0f} images/s, {self.rejected:,} rows rejected, {left}"
        )

    def call(self) -> None:
        """Log the state."""
        log.info("%s", self.line(time.monotonic() - self._began))
