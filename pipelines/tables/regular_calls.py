"""A call from time to time while a job works: for lines of progress, and for watching the cluster."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

__all__ = ["RegularCalls"]

log = logging.getLogger(__name__)


class RegularCalls(ABC):
    """A context in which ``call`` runs every ``every_s`` seconds, in a thread; one that fails costs a line of log."""

    def __init__(self, every_s: float, name: str):
        self._every_s, self._ended = every_s, threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def call(self) -> None:
        """What is done from time to time."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self.call()
            except Exception as error:  # nothing that the job depends on: it says itself what is wrong
                log.warning("%s: %s: %s", self._thread.name, type(error).__name__, error)
