"""Reading the parts of prepared tables: storage that fails is waited for, and a part that cannot be read is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TypeVar

import pyarrow as pa

from crem.errors import ConfigError
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import TIMEOUT_S, require_storage

__all__ = ["THREADS", "in_threads", "open_part", "read_part"]

THREADS = 16
"""Requests of one process at a time: an object store takes some 10 ms to answer any. Source: ours."""
_BLOCK_BYTES = 8 * 2**20
"""Of a part that is read from its start to its end."""
_T = TypeVar("_T")
_S = TypeVar("_S")


def read_part(folder: Folder, name: str, call: Callable[[], _T]) -> _T:
    """The result of ``call``, which reads the part ``name`` and is called again while storage fails.

    Raises:
        ConfigError: the part is missing or damaged, or may not be read. StorageError: storage did not answer.
    """
    part = f"{folder.uri}/{name}"
    try:
        return require_storage(f"reading {part}", call, timeout_s=folder.patience_s or TIMEOUT_S)
    except FileNotFoundError as error:
        raise ConfigError(f"{part} is missing; run crem prepare again") from error
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(f"{part} is damaged or cannot be read: {detail}; run crem prepare again") from error


def open_part(folder: Folder, name: str, *, whole: bool) -> IO[bytes]:
    """The part ``name``, opened to read the ``whole`` of it in order, or some places in it."""
    path = folder.path(name)
    if folder.is_local:
        return open(path, "rb")
    how = {"cache_type": "readahead", "block_size": _BLOCK_BYTES} if whole else {"cache_type": "none"}
    opened: IO[bytes] = folder.fs.open(path, "rb", **how)
    return opened


def in_threads(call: Callable[[_S], _T], items: Iterable[_S]) -> list[_T]:
    """``call`` of each item, in their order; raises the first error.

    Local disks answer one request as fast as several: fewer threads there leave the cores to others.
    """
    with ThreadPoolExecutor(min(THREADS, 4 * (os.cpu_count() or 1))) as threads:
        return list(threads.map(call, items))
