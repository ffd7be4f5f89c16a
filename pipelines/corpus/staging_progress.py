"""How far the staging is: a line in the log every ten seconds, whether or not a piece was finished in them."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

from pipelines.corpus.staging import PieceCounts

__all__ = ["StagingProgress"]

log = logging.getLogger(__name__)

_EVERY_S = 10.0


class StagingProgress:
    """Counts pieces that are staged; a context that reports while it is open.

    Args:
        records: of the corpus.
        earlier: records of pieces that an interrupted run staged.
    """

    def __init__(self, records: int, earlier: int = 0):
        self._records, self._earlier = records, earlier
        self.done = self.rows = self.rejected = self.images = 0
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)

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

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _report(self) -> None:
        while not self._ended.wait(_EVERY_S):
            log.info("%s", self.line(time.monotonic() - self._began))
