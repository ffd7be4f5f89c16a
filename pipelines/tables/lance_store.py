"""Lance's own access to storage: the options it needs, and its failures as what they are.

Lance has no exceptions for a missing file, a damaged one or a store that does not answer: it raises ``OSError``,
``ValueError`` or ``RuntimeError`` with a text, and at some damaged files its Rust code panics.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from crem.errors import CremError

__all__ = ["is_of_storage", "lance_failures", "panicked", "store_options"]

_OF_STORAGE = re.compile(r"Generic \w+ error|error sending request|timed? ?out|connection|HTTP (5|429)", re.IGNORECASE)
"""How Lance says that a store does not answer."""
_OS_ERROR = re.compile(r"os error (\d+)")
_ABSENT = re.compile(r"Not found: |No such file")


def store_options(uri: str) -> dict[str, str] | None:
    """Options of Lance's store, which has credentials and endpoint from the environment, and no http unless told."""
    plain_http = "://" in uri and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return {"allow_http": "true"} if plain_http else None


def panicked(error: BaseException) -> bool:
    """Whether Rust code did, whose exception is no ``Exception``."""
    return type(error).__name__ == "PanicException"


def is_of_storage(uri: str, error: BaseException) -> bool:
    """Whether Lance says that the store of ``uri`` does not answer."""
    return "://" in uri and _OF_STORAGE.search(str(error)) is not None


@contextmanager
def lance_failures(uri: str) -> Iterator[None]:
    """What Lance raises while it reads or writes ``uri``, as others would raise it.

    Raises:
        FileNotFoundError: a file is missing. OSError: the store does not answer, or whatever else the operating system
            says with a number. pyarrow.ArrowInvalid: anything else; as a rule a file is damaged.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, CremError | pa.ArrowException) or not (isinstance(error, Exception) or panicked(error)):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise
        detail = " ".join(str(error).split())[:300]
        if is_of_storage(uri, error):
            raise OSError(errno.EIO, detail) from error
        if number := _OS_ERROR.search(detail):
            raise OSError(int(number[1]), detail) from error  # of the class that fits the number
        if _ABSENT.search(detail):
            raise FileNotFoundError(errno.ENOENT, detail) from error
        raise pa.ArrowInvalid(f"Lance says of {uri}: {detail}") from error
