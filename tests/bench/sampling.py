"""Calls a function again and again in a thread while a piece of work runs: how benchmarks see what processes hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["sampled"]


@contextmanager
def sampled(sample: Callable[[], None], every_s: float = 0.2) -> Iterator[None]:
    """Call ``sample`` every ``every_s`` seconds until the work ends."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            sample()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
