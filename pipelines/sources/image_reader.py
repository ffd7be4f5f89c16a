"""The images of a corpus: in ``images/`` beside the rows, in ``images.zip``, or wherever an absolute name points.

Each process opens an archive once and keeps it open, because its directory of names can be large.
"""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache

from crem.config import ImageConfig
from crem.data.image_bytes import fetch_bytes, is_inline, read_bytes, read_error
from crem.errors import ConfigError, CremError, ItemError, StorageError, shortened
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import TIMEOUT_S, retry_storage

__all__ = ["ImageReader"]

ARCHIVE = "images.zip"


class ImageReader:
    """Reads the encoded bytes of the images that rows name."""

    def __init__(
        self, root: str, archive: str | None, folder: str | None, limits: ImageConfig, *, timeout_s: float = TIMEOUT_S
    ):
        self.root = root
        self.archive = archive
        """Version of ``images.zip`` (its size), or ``None`` where the corpus has none."""
        self.folder = folder
        """Where relative names start, unless they name members of the archive."""
        self.limits = limits
        self.timeout_s = timeout_s
        """How long one image waits for storage that does not answer."""

    @classmethod
    def of(cls, root: Folder, limits: ImageConfig) -> ImageReader:
        """The reader of a corpus; the driver looks once where its images are.

        Raises:
            ConfigError: ``images.zip`` is not a zip archive.
        """
        archive = str(root.fs.size(root.path(ARCHIVE))) if root.exists(ARCHIVE) else None
        if archive is not None:
            _open_archive(root.uri, archive)
        return cls(root.uri, archive, root.child("images").uri if root.exists("images") else root.uri, limits)

    @property
    def files(self) -> tuple[str, ...]:
        """Files at the root of the corpus that every task opens: ``images.zip``, if there is one."""
        return () if self.archive is None else (ARCHIVE,)

    def read(self, source: str | bytes) -> bytes:
        """Encoded bytes of an image.

        Raises:
            ItemError: ``image_missing``, ``image_too_large``, ``image_corrupt``, ``uri_refused``.
            StorageError: the store did not answer for ``timeout_s``, or does not let this job in.
        """
        if isinstance(source, bytes):
            return source
        if is_inline(source):
            return read_bytes(source, self.limits)
        return self._patiently(source, lambda: self._read(source))

    def _patiently(self, name: str, read: Callable[[], bytes]) -> bytes:
        """``read``, tried again while the store does not answer."""

        def attempt() -> bytes:
            try:
                return read()
            except Exception as error:
                meaning = read_error(name, error)
                if isinstance(meaning, StorageError) and meaning.transient:
                    raise
                raise meaning from error

        try:
            return retry_storage(f"image {shortened(name)!r}", attempt, timeout_s=self.timeout_s)
        except CremError:
            raise
        except Exception as error:
            raise read_error(name, error) from error

    def _read(self, source: str) -> bytes:
        if self.archive is None or _is_absolute(source):
            return fetch_bytes(source, self.limits, base=self.folder)
        return self._read_member(source)

    def _read_member(self, name: str) -> bytes:
        archive, lock = _open_archive(self.root, self.archive or "")
        member = archive.NameToInfo.get(name) or archive.NameToInfo.get(f"images/{name}")
        if member is None or member.is_dir():
            raise ItemError("image_missing", f"{name!r} is not in {self.root}/{ARCHIVE}")
        if member.file_size > self.limits.max_source_bytes:
            raise ItemError(
                "image_too_large",
                f"{name!r} unpacks to {member.file_size} bytes; the limit is {self.limits.max_source_bytes}; "
                "shrink it or raise model.image.max_source_bytes",
            )
        try:
            with lock:
                return archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ItemError("image_corrupt", f"{name!r} in {ARCHIVE} is damaged: {error}") from error
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or of an unsupported compression
            raise ItemError("image_corrupt", f"{name!r} in {ARCHIVE}: {error}") from error


def _is_absolute(name: str) -> bool:
    """Whether an image's name is an absolute path, a URI or a data URL."""
    return "://" in name or name.startswith("data:") or os.path.isabs(name)


@lru_cache(maxsize=4)
def _open_archive(root: str, version: str) -> tuple[zipfile.ZipFile, threading.Lock]:
    try:
        return zipfile.ZipFile(Folder(root).open(ARCHIVE)), threading.Lock()
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigError(f"{root}/{ARCHIVE} cannot be read: {error}; write the archive again") from error
