"""Uploads of a rank: its parts of checkpoints in the background, and finished models.

A failed upload is tried again, with longer and longer pauses, until the next checkpoint is due, which replaces it. One
upload is in flight at a time, so a worker's disk holds one copy of its part.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from crem.checkpoint import CREM_FILE
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import LONGEST_PAUSE_S, TIMEOUT_S
from pipelines.training.checkpoints import Checkpoints

__all__ = ["Uploads", "upload_model"]

log = logging.getLogger(__name__)


class Uploads:
    """One rank's uploads of checkpoints, in a thread, one at a time (a ``crem.train.checkpoint_writer.PartStore``).

    Args:
        attempt: names this start of the workers.
        keep: complete checkpoints to keep.
        warn: takes warnings for the user.
    """

    def __init__(
        self, checkpoints: Checkpoints, *, rank: int, attempt: str, keep: int, warn: Callable[[str], None] = log.warning
    ):
        self._checkpoints, self._rank, self._attempt, self._keep, self._warn = checkpoints, rank, attempt, keep, warn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None
        self._give_up = threading.Event()

    def start(self, local: Path, step: int) -> None:
        """Upload a rank's part, which is then removed. Call ``make_room`` before it is written."""
        assert self._in_flight is None, "one upload at a time"
        self._in_flight = self._thread.submit(self._upload, local, f"step-{step:08d}-{self._attempt}", step)

    def make_room(self) -> None:
        """Wait for the upload in flight. One that is failing is given up, because a newer checkpoint is due."""
        if self._in_flight is None:
            return
        began = time.monotonic()
        self._give_up.set()
        self._in_flight.result()
        if (waited_s := time.monotonic() - began) > 10:
            log.warning("training waited %.0f s for the checkpoint before; raise train.checkpoint_every", waited_s)
        self._settled()

    def finish(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait for the last upload; a failing one is tried again for ``timeout_s``."""
        if self._in_flight is not None:
            timer = threading.Timer(timeout_s, self._give_up.set)
            timer.daemon = True
            timer.start()
            self._in_flight.result()
            timer.cancel()
            self._settled()
        self._thread.shutdown()

    def _settled(self) -> None:
        self._give_up.clear()
        self._in_flight = None

    def _upload(self, local: Path, name: str, step: int) -> None:
        pause_s, failures = 1.0, 0
        try:
            while True:
                try:
                    self._checkpoints.write(name, local)
                    break
                except Exception as error:  # storage fails in many ways, and none of them may end the run
                    failures += 1
                    log.warning("attempt %d to write the checkpoint of step %d: %s", failures, step, error)
                    if failures == 1:
                        self._warn(
                            f"the checkpoint of step {step} is not written: {self._checkpoints.folder.uri} failed rank "
                            f"{self._rank} ({error}). Training continues; the upload is tried again until the next "
                            "checkpoint is due"
                        )
                if self._give_up.wait(pause_s):
                    self._warn(
                        f"there is NO checkpoint of step {step}: rank {self._rank} gave it up after {failures} attempts"
                    )
                    return
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
            if failures:
                self._warn(f"rank {self._rank} wrote its part of the checkpoint of step {step} after all")
            if self._rank == 0:
                self.tidy()
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def tidy(self) -> None:
        """Remove old checkpoints and abandoned parts; a failure is left to the next call."""
        try:
            self._checkpoints.tidy(keep=self._keep, attempt=self._attempt)
        except Exception as error:
            log.warning("old checkpoints could not be removed: %s", error)


def upload_model(local: str, target: Folder) -> None:
    """Copy a finished model; ``crem.json``, without which it is no checkpoint, goes last."""
    target.remove(CREM_FILE)
    for name in sorted(os.listdir(local), key=lambda n: n == CREM_FILE):
        with open(os.path.join(local, name), "rb") as source, target.open(name, mode="wb") as file:
            while block := source.read(2**24):
                file.write(block)
