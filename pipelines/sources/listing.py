"""Lists a folder and all below it on any store: folders in parallel, pages as they come, no call for a single file.

What a listing says of a file (size, and entity tag or time of change) is its stamp. On S3 one folder is listed a page
of 1,000 keys at a time, so the memory does not grow with it; other stores give a folder at once.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from pipelines.sources.input_file import stamp_of, storage_call
from pipelines.tables.storage import Folder

__all__ = ["Entry", "list_folder", "list_tree", "lists_in_order"]

T = TypeVar("T")

_THREADS = 16
_BATCH = 1000
_WAITING_BATCHES = 64
_TIMEOUT_S = 120.0
"""How long a listing waits for storage that does not answer: a job that has not begun can as well be started again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a folder in a listing."""

    name: str
    """Path from the folder that was listed; of a folder with a slash at its end."""
    size: int = 0
    version: str = ""
    """As in ``FileStamp``."""

    @property
    def is_folder(self) -> bool:
        return self.name.endswith("/")


def lists_in_order(folder: Folder) -> bool:
    """Whether the store lists files by name, and from any name on: ``list_folder`` then takes ``after``."""
    return hasattr(folder.fs, "call_s3")


def list_folder(folder: Folder, below: str = "", *, after: str = "") -> Iterator[list[Entry]]:
    """What stands directly in a folder, in batches; in no order, but where ``lists_in_order``.

    Args:
        below: path of the folder to list, from ``folder``, with a slash at its end.
        after: list what comes after this name only; other stores list all.

    Raises:
        ConfigError: it may not be read.
        StorageError: the storage stays away.
    """
    if isinstance(folder.fs, LocalFileSystem):
        yield from _list_local(folder, below)
    elif lists_in_order(folder):
        yield from _list_s3(folder, below, after)
    else:
        path = folder.path(below.rstrip("/")) if below else folder.path()
        found = _call(folder, below, lambda: folder.fs.ls(path, detail=True))
        yield [_entry(below, details["name"], details) for details in found if _base(details["name"])]


def list_tree(folder: Folder, enter: Callable[[str], bool]) -> Iterator[list[Entry]]:
    """All below a folder, in batches, in no order.

    Args:
        enter: whether to list a folder, by its path with a slash at its end; of one that is not, the folder is given.

    Raises: as ``list_folder`` does.
    """
    found: queue.Queue[list[Entry] | BaseException | None] = queue.Queue(_WAITING_BATCHES)
    open_folders, lock, stopped = 1, Lock(), False

    def visit(below: str) -> None:
        nonlocal open_folders
        try:
            for batch in list_folder(folder, below):
                if stopped:
                    break
                inner = [entry.name for entry in batch if entry.is_folder and enter(entry.name)]
                with lock:
                    open_folders += len(inner)
                for name in inner:
                    threads.submit(visit, name)
                entered = set(inner)
                found.put([entry for entry in batch if entry.name not in entered])
        except BaseException as error:
            found.put(error)
        with lock:
            open_folders -= 1
            last = open_folders == 0
        if last:
            found.put(None)

    with ThreadPoolExecutor(_THREADS) as threads:
        threads.submit(visit, "")
        try:
            while (batch := found.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stopped = True
            threads.shutdown(wait=False, cancel_futures=True)
            while not found.empty():  # a thread may wait to put
                found.get_nowait()


def _list_local(folder: Folder, below: str) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    with _call(folder, below, lambda: os.scandir(folder.path(below) if below else folder.path())) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    # a link to a folder above itself would never end
                    linked = entry.is_symlink() and _is_above(entry.path)
                    batch.append(Entry(f"{below}{entry.name}/" if not linked else f"{below}{entry.name}"))
                else:
                    status = entry.stat()
                    batch.append(Entry(f"{below}{entry.name}", status.st_size, str(status.st_mtime_ns)))
            except FileNotFoundError:  # a link to nothing, or removed just now
                batch.append(Entry(f"{below}{entry.name}", -1))
            if len(batch) >= _BATCH:
                yield batch
                batch = []
    yield batch


def _is_above(path: str) -> bool:
    target = os.path.realpath(path)
    here = os.path.realpath(os.path.dirname(path))
    return here == target or here.startswith(f"{target.rstrip('/')}/")


def _list_s3(folder: Folder, below: str, after: str) -> Iterator[list[Entry]]:
    bucket, _, prefix = folder.path().partition("/")
    prefix = f"{prefix}/" if prefix else ""
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix + below, "Delimiter": "/", "MaxKeys": _BATCH}
    if after:
        request["StartAfter"] = prefix + below + after
    while True:
        page = _call(folder, below, lambda: folder.fs.call_s3("list_objects_v2", **request))
        files = [
            Entry(item["Key"].removeprefix(prefix), item["Size"], stamp_of("", item).version)
            for item in page.get("Contents", ())
            if not item["Key"].endswith("/")  # what stands for an empty folder
        ]
        yield files + [Entry(item["Prefix"].removeprefix(prefix)) for item in page.get("CommonPrefixes", ())]
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _entry(below: str, path: str, details: dict[str, Any]) -> Entry:
    name = f"{below}{_base(path)}"
    if details.get("type") == "directory":
        return Entry(f"{name}/")
    stamp = stamp_of(name, details)
    return Entry(name, stamp.size, stamp.version)


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _call(folder: Folder, below: str, call: Callable[[], T]) -> T:
    return storage_call(f"{folder.uri}/{below}", call, timeout_s=_TIMEOUT_S)
