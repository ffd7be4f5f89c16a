"""The images of a corpus: in ``images/`` beside the rows, in ``images.zip``, or wherever an absolute name points.

Each process opens an archive once and keeps it open, because its directory of names can be large.
"""

from __future__ import annotations

import os
import threading
import zipfile
import zlib
from functools import lru_cache

from crem.config import ImageConfig
from crem.data.images import read_bytes
from crem.errors import ConfigError, ItemError
from pipelines.tables.storage import Folder

__all__ = ["ImageReader"]

ARCHIVE = "images.zip"


class ImageReader:
    """Reads the encoded bytes of the images that rows name."""

    def __init__(self, root: str, archive: str | None, folder: str | None, limits: ImageConfig):
        self.root = root
        self.archive = archive
        """Version of ``images.zip`` (its size), or ``None`` where the corpus has none."""
        self.folder = folder
        """Where relative names start, unless they name members of the archive."""
        self.limits = limits

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
            ItemError: ``image_missing``, ``image_too_large``, ``image_corrupt``, ``uri_unreadable``, ``uri_refused``.
        """
        if isinstance(source, bytes):
            return source
        if self.archive is None or _is_absolute(source):
            return read_bytes(source, self.limits, base=self.folder)
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
        except (RuntimeError, NotImplementedError, OSError) as error:  # encrypted, or of an unsupported compression
            raise ItemError("uri_unreadable", f"{name!r} in {ARCHIVE}: {type(error).__name__}: {error}") from error


def _is_absolute(name: str) -> bool:
    """Whether an image's name is an absolute path, a URI or a data URL."""
    return "://" in name or name.startswith("data:") or os.path.isabs(name)


@lru_cache(maxsize=4)
def _open_archive(root: str, version: str) -> tuple[zipfile.ZipFile, threading.Lock]:
    try:
        return zipfile.ZipFile(Folder(root).open(ARCHIVE)), threading.Lock()
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigError(f"{root}/{ARCHIVE} cannot be read: {error}; write the archive again") from error
