"""Retries around storage that may fail for minutes without ending a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from crem.errors import CremError

__all__ = ["LONGEST_PAUSE_S", "TIMEOUT_S", "retry_storage"]

log = logging.getLogger(__name__)

TIMEOUT_S = 600.0
"""How long a start or an end waits for storage that does not answer. Source: ours."""
LONGEST_PAUSE_S = 30.0
"""Pauses between attempts double from 1 s to this."""
T = TypeVar("T")


def retry_storage(what: str, call: Callable[[], T], *, timeout_s: float = TIMEOUT_S) -> T:
    """The result of ``call``, which is called again while storage fails, for at most ``timeout_s``.

    A missing file, and an error that is meant for the user, are raised at once.
    """
    deadline, pause_s = time.monotonic() + timeout_s, 1.0
    while True:
        try:
            return call()
        except (CremError, FileNotFoundError, TypeError, ValueError, AssertionError):
            raise
        except Exception as error:  # botocore's, aiohttp's and the operating system's have nothing in common
            if time.monotonic() + pause_s > deadline:
                raise
            log.warning("%s: storage failed (%s); trying again in %.0f s", what, error, pause_s)
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
