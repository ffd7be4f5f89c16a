"""A deadline that ends the process: work that never ends becomes a process that died, which Ray runs again.

The kernel's timer sends SIGALRM, whose default is to end the process. A thread that watches would need the
interpreter, which a decoder or a driver of a device that hangs may hold. There is one timer for a process, set to the
earliest deadline of its threads: Ray Data may put the tasks that read and the actor that embeds into one process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

__all__ = ["arm", "deadline", "disarm"]

_LOCK = threading.Lock()
_ENDS: dict[int, float] = {}
"""When each thread is to be done, by its identity."""


def arm(seconds: float) -> None:
    """End this process in ``seconds``, unless this thread arms it anew or disarms it before."""
    _traceback_at_the_end()
    with _LOCK:
        _ENDS[threading.get_ident()] = time.monotonic() + seconds
        _set_timer()


def disarm() -> None:
    """This thread is done in time."""
    with _LOCK:
        _ENDS.pop(threading.get_ident(), None)
        _set_timer()


def _set_timer() -> None:
    left = max(1e-6, min(_ENDS.values()) - time.monotonic()) if _ENDS else 0  # 0 would stop the timer
    signal.setitimer(signal.ITIMER_REAL, left)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer."""
    arm(seconds)
    try:
        yield
    finally:
        disarm()


@lru_cache(1)
def _traceback_at_the_end() -> None:
    """Write where the process was to its log, by code that needs no interpreter, before the signal ends it."""
    with contextlib.suppress(Exception):  # a stderr without a file descriptor
        faulthandler.register(signal.SIGALRM, file=sys.stderr, chain=True)
