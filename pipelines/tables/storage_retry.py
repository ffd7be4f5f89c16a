"""Storage that fails: which failures pass by themselves, and waiting for those that do.

A failure of storage is not a failure of data. ``storage_fault`` tells what is the user's (a missing bucket, a wrong
secret) or the program's from what ends by itself (a server that restarts, a full queue, a broken connection). Only the
latter is tried again. Stores have no exception in common: s3fs turns the answers of a server into ``OSError``s with an
``errno`` and lets those of botocore and aiohttp through, and PyArrow puts the code into the text.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from enum import StrEnum
from typing import TypeVar

from crem.errors import ConfigError, CremError, StorageError

__all__ = [
    "CREDENTIALS",
    "LONGEST_PAUSE_S",
    "TIMEOUT_S",
    "StorageFault",
    "require_storage",
    "retry_storage",
    "storage_fault",
]

log = logging.getLogger(__name__)

TIMEOUT_S = 600.0
"""How long a job waits for storage that does not answer. Source: ours."""
LONGEST_PAUSE_S = 30.0
"""Pauses between attempts double from 1 s to this."""
CREDENTIALS = (
    "for s3:// set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION "
    "and, for another S3 than Amazon's, AWS_ENDPOINT_URL"
)
"""The remedy of a refused access."""

_NETWORK = {"aiohttp", "azure", "fsspec", "gcsfs", "google", "http", "requests", "urllib3"}
"""Packages whose exceptions tell of a connection."""
_BOTOCORE = {
    "ConnectionError",
    "CredentialRetrievalError",
    "HTTPClientError",
    "IncompleteReadError",
    "MetadataRetrievalError",
    "ResponseParserError",
    "ResponseStreamingError",
}
"""Those of botocore's classes that do; the others tell of a wrong call or configuration."""
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "NoSuchUpload",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
"""Answers of S3 with a status of 4xx that another attempt can change; an upload is lost when its server restarts."""
_PASSING_ERRNOS = {
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO",
        "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOTCONN", "EPIPE", "EREMOTEIO", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
}  # fmt: skip
_PYARROW = re.compile(r"AWS Error (\w+)")
_T = TypeVar("_T")


class StorageFault(StrEnum):
    """What a failed access to storage means."""

    ABSENT = "absent"
    """The file or the bucket is not there."""
    DENIED = "denied"
    """Credentials are missing, wrong, or do not suffice."""
    PASSING = "passing"
    """The store does not answer, answers that it cannot now, or a connection broke."""
    LASTING = "lasting"
    """Anything else: trying again changes nothing."""


def storage_fault(error: BaseException) -> StorageFault:
    """What ``error`` means; the exception of the server that s3fs keeps as its cause decides first."""
    if isinstance(error, CremError):
        return StorageFault.LASTING
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict) and "Error" in response:
        answered = _of_answer(response)
        if answered is not None:
            return answered
    if isinstance(error, FileNotFoundError):
        return StorageFault.ABSENT
    kind = type(error).__name__
    if isinstance(error, PermissionError) or kind in ("NoCredentialsError", "PartialCredentialsError"):
        return StorageFault.DENIED
    if isinstance(error, ConnectionError | TimeoutError) or _BOTOCORE & {base.__name__ for base in type(error).__mro__}:
        return StorageFault.PASSING
    if type(error).__module__.partition(".")[0] in _NETWORK:
        return StorageFault.LASTING if isinstance(error, ValueError | TypeError) else StorageFault.PASSING
    return _of_os_error(error) if isinstance(error, OSError) else StorageFault.LASTING


def retry_storage(what: str, call: Callable[[], _T], *, timeout_s: float = TIMEOUT_S) -> _T:
    """The result of ``call``, which is called again while storage fails, for at most ``timeout_s``.

    Raises:
        Exception: the last one of ``call``; at once if it does not pass by itself (``storage_fault``).
    """
    deadline, pause_s = time.monotonic() + timeout_s, 1.0
    while True:
        try:
            return call()
        except Exception as error:
            if storage_fault(error) is not StorageFault.PASSING or time.monotonic() + pause_s > deadline:
                raise
            log.warning("%s: storage failed (%s); trying again in %.0f s", what, _line(error), pause_s)
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)


def require_storage(what: str, call: Callable[[], _T], *, timeout_s: float = TIMEOUT_S) -> _T:
    """``retry_storage`` for a job that cannot go on without the result.

    Raises:
        StorageError: the storage did not answer in all that time. ConfigError: access is denied. FileNotFoundError and
            whatever else does not pass by itself: as ``call`` raised it.
    """
    began = time.monotonic()
    try:
        return retry_storage(what, call, timeout_s=timeout_s)
    except Exception as error:
        fault = storage_fault(error)
        if fault is StorageFault.DENIED:
            raise ConfigError(f"{what}: access is denied: {_line(error)}; {CREDENTIALS}") from error
        if fault is StorageFault.PASSING:
            raise StorageError(
                f"{what}: the storage did not answer for {time.monotonic() - began:.0f} s: {_line(error)}; start it or "
                "wait until it answers, then run the same command again: it continues where it stopped"
            ) from error
        raise


def _of_answer(response: dict[str, dict[str, object]]) -> StorageFault | None:
    """The fault that an error answer of S3 tells, or ``None`` where it tells none."""
    code = str(response["Error"].get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code in _PASSING_CODES or "Throttl" in code or status in (408, 429):
        return StorageFault.PASSING
    if isinstance(status, int) and status >= 500 and status != 501:
        return StorageFault.PASSING
    if status in (401, 403):
        return StorageFault.DENIED
    if status == 404:
        return StorageFault.ABSENT
    return StorageFault.LASTING if isinstance(status, int) and 400 <= status < 500 else None


def _of_os_error(error: OSError) -> StorageFault:
    if match := _PYARROW.search(str(error)):
        code = match[1]
        if code in ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH"):
            return StorageFault.DENIED
        return StorageFault.ABSENT if code.startswith("NO_SUCH") else StorageFault.PASSING
    return StorageFault.PASSING if error.errno in _PASSING_ERRNOS else StorageFault.LASTING


def _line(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
