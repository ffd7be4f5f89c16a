"""One input file: bytes that survive failures of the storage, its stamp, and the fingerprint of its content.

Storage that fails is not a file that is damaged. A read that fails is tried again at the same byte, so no row is lost
or given twice; if the storage stays away, the job ends with ``StorageError``, and no container takes that for bad
data. A file that is not what it was when the job began is a ``ConfigError``.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import IO, Any, TypeVar

from crem.errors import ConfigError, CremError, StorageError
from pipelines.sources.records import FileStamp, RowRange
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import TIMEOUT_S, StorageFault, require_storage, storage_fault

__all__ = ["InputFile", "current_stamp", "stamp_of", "storage_call"]

T = TypeVar("T")

_BUFFER_BYTES = 4 * 2**20
"""Size of one read of a stream: large enough for an object store, small beside the rows."""
_BLOCK_BYTES = 64 * 2**10
"""The fingerprint hashes the first, the middle and the last block."""
_GONE_TRIES, _GONE_PAUSE_S = 3, 1.0
"""A store that has just started may not know its objects for a moment."""


@dataclass(frozen=True)
class InputFile:
    """A file of a corpus, as it was when the corpus was listed."""

    folder: str
    """URI of the folder that was listed."""
    name: str
    """Path from there."""
    container: str
    size: int
    version: str
    fingerprint: str = ""
    content: bytes | None = field(default=None, compare=False, repr=False)
    """All of a small file, if it has been read."""

    @classmethod
    def of(cls, rows: RowRange) -> InputFile:
        """The file of a range."""
        return cls(rows.folder, rows.file, rows.container, rows.size, rows.version, rows.fingerprint)

    @property
    def uri(self) -> str:
        return f"{self.folder}/{self.name}"

    def range(self, first: int, rows: int, **where: Any) -> RowRange:
        """A range of its rows; ``where`` as in ``RowRange``."""
        return RowRange(
            self.folder, self.name, self.container, self.size, self.version, self.fingerprint, first, rows, **where
        )

    def open(self, offset: int = 0, end: int = 0) -> IO[bytes]:
        """A buffered stream of its bytes, for reading from front to end.

        Args:
            end: byte at which the caller will probably stop, so that no more is fetched; 0 if it is not known.

        Raises, here and when it is read:
            ConfigError: the file is gone or may not be read.
            StorageError: the storage fails for longer than ``storage_retry.TIMEOUT_S``.
        """
        wanted = max(_BLOCK_BYTES, (end or self.size) - offset)
        stream = io.BufferedReader(self.open_raw(), min(_BUFFER_BYTES, wanted))
        if offset:
            stream.seek(offset)
        return stream

    def open_raw(self) -> _Bytes:
        """Its bytes without a buffer, for a reader that asks for what it needs. Raises as ``open`` does."""
        return _Bytes(Folder(self.folder), self.name, self.size, self.content)

    def identified(self, extra: str = "") -> InputFile:
        """With the fingerprint of its content.

        Two files of equal size that differ only outside of three blocks have the same; hashing all of a corpus would
        double the reading of it.

        Args:
            extra: what else belongs to the content: values that the path of the file gives to its rows.
        """
        digest = hashlib.blake2b(f"{self.size}\0{extra}\0".encode(), digest_size=8)
        with self.open_raw() as raw:
            if self.size <= 3 * _BLOCK_BYTES:
                content = raw.read_exactly(0, self.size)
                digest.update(content)
                return replace(self, fingerprint=digest.hexdigest(), content=content)
            else:
                for start in (0, (self.size - _BLOCK_BYTES) // 2, self.size - _BLOCK_BYTES):
                    digest.update(raw.read_exactly(start, _BLOCK_BYTES))
        return replace(self, fingerprint=digest.hexdigest())

    def check_unchanged(self, now: FileStamp | None = None) -> None:
        """Refuse a file that has been written since the corpus was listed.

        Args:
            now: its stamp as it is now, if the caller has it.

        Raises:
            ConfigError: it has another size, entity tag or time of change, or is gone.
        """
        folder = Folder(self.folder)
        now = now or storage_call(self.uri, lambda: current_stamp(folder, self.name))
        if (now.size, now.version) != (self.size, self.version):
            raise ConfigError(
                f"{self.uri} has changed since this job began: it had {self.size} bytes (version {self.version}) "
                f"and has {now.size} ({now.version}); run again once nothing writes to it"
            )


def current_stamp(folder: Folder, name: str) -> FileStamp:
    """The stamp of a file as it is now."""
    path = folder.path(name)
    if folder.is_local:
        status = os.stat(path)
        return FileStamp(name, status.st_size, str(status.st_mtime_ns))
    return stamp_of(name, folder.fs.info(path))


def stamp_of(name: str, details: dict[str, Any]) -> FileStamp:
    """The stamp of a file from what a store says of it, in a listing or alone."""
    version = next(
        (details[k] for k in ("ETag", "etag", "mtime", "LastModified", "last_modified") if details.get(k)), ""
    )
    return FileStamp(name, int(details.get("size") or 0), str(version).strip('"'))


def storage_call(uri: str, call: Callable[[], T], *, timeout_s: float = TIMEOUT_S) -> T:
    """The result of ``call``, tried again while storage fails.

    Raises:
        ConfigError: the file is gone or may not be read.
        StorageError: the storage stays away.
    """

    def attempt() -> T:
        for tries_left in reversed(range(_GONE_TRIES)):
            try:
                return call()
            except Exception as error:
                if storage_fault(error) is not StorageFault.ABSENT:
                    raise
                if not tries_left:
                    raise ConfigError(
                        f"{uri} is gone since this job began; run again once nothing writes there"
                    ) from error
                time.sleep(_GONE_PAUSE_S)
        raise AssertionError

    try:
        return require_storage(f"reading {uri}", attempt, timeout_s=timeout_s)
    except CremError:
        raise
    except Exception as error:  # not of what is in the file: no container may take it for damage
        raise StorageError(
            f"{uri} could not be read, and not because of what is in it: {type(error).__name__}: {error}; "
            "see to the storage and run again",
            False,
        ) from error


class _Bytes(io.RawIOBase):
    """Reads by ranges, each retried; holds no connection that could break between them."""

    def __init__(self, folder: Folder, name: str, size: int, content: bytes | None = None):
        super().__init__()
        self._folder, self._name, self._size, self._content = folder, name, size, content
        self._uri = f"{folder.uri}/{name}"
        self._local: IO[bytes] | None = None
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(22, f"seek to {base + offset} in {self._uri}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._at))
        if count:
            view[:count] = self.read_exactly(self._at, count)
            self._at += count
        return count

    def read_exactly(self, start: int, count: int) -> bytes:
        """``count`` bytes from ``start``."""
        if not count:
            return b""
        if self._content is not None:
            return self._content[start : start + count]
        data = storage_call(self._uri, lambda: self._fetch(start, count))
        if len(data) != count:
            raise ConfigError(
                f"{self._uri} ends at byte {start + len(data)} and had {self._size} when this job began; "
                "run again once nothing writes to it"
            )
        return data

    def close(self) -> None:
        if self._local is not None:
            self._local.close()
        super().close()

    def _fetch(self, start: int, count: int) -> bytes:
        path = self._folder.path(self._name)
        if not self._folder.is_local:
            return self._fetch_remote(path, start, count)
        if self._local is None or self._local.closed:
            self._local = open(path, "rb", buffering=0)  # noqa: SIM115 - closed in close()
        try:
            parts = b""
            while len(parts) < count and (
                part := os.pread(self._local.fileno(), count - len(parts), start + len(parts))
            ):
                parts = part if not parts else parts + part
            return parts
        except OSError:
            self._local.close()
            raise

    def _fetch_remote(self, path: str, start: int, count: int) -> bytes:
        try:
            return bytes(self._folder.fs.cat_file(path, start=start, end=start + count))
        except OSError as error:
            if "InvalidRange" in str(error) or "range is not" in str(error).lower():
                return b""  # it is shorter than it was
            raise
