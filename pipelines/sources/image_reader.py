"""The images that the rows of a corpus name: in its folder, in zip archives in it, or at URIs that are allowed.

A relative name is sought in this order, and the first that exists is the image:

1. zip archives at the top of the corpus and in its folders whose names start with ``image`` or ``zip``: first the one
   named like a folder in the name (``MSCOCO.zip`` for ``images/MSCOCO/Train/1.jpg``), then ``images.zip``, then the
   others by name. A member may leave out ``images/`` and the archive's own name, or have ``images/`` in front.
2. The folder of the row file, where the caller names one.
3. ``images/`` of the corpus, then the corpus folder; the other way round for a name that starts with ``images/``.

Names match in either normal form of Unicode, and ``\\`` stands for ``/`` where no file has it in its name. Nothing is
read from outside of the corpus but what ``image_roots`` and ``url_hosts`` allow.

Storage that does not answer is tried again for ``timeout_s``; then the job fails. It never rejects a row.
"""

from __future__ import annotations

import errno
import logging
import os
import posixpath
import re
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from crem.config import ImageAccess, ImageConfig
from crem.data.image_bytes import SCHEMES, fetch_bytes, inline_bytes, read_error, read_file, too_many_bytes
from crem.errors import ConfigError, CremError, ItemError, StorageError, shortened
from pipelines.sources.image_roots import ImageRoots
from pipelines.sources.url_reader import read_url
from pipelines.sources.zip_archives import ZipArchive, opened
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import TIMEOUT_S, retry_storage

__all__ = ["ImageReader"]

log = logging.getLogger(__name__)

_IMAGES = "images"
_ARCHIVE = "images.zip"
_ARCHIVE_FOLDERS = re.compile(r"(?i)images?|zip")
_LOCAL = LocalFileSystem()
_URL = re.compile(r"(?i)https?://")


@dataclass(frozen=True)
class ImageReader:
    """Reads the encoded bytes of the images that rows name. Pickles; each process opens its own connections."""

    root: str
    """Path or URI of the corpus."""
    limits: ImageConfig
    access: ImageAccess
    archives: tuple[ZipArchive, ...] = ()
    has_images: bool = True
    """Whether the corpus has a folder ``images/``."""
    unopened: tuple[str, ...] = ()
    """Archives that were seen elsewhere in the corpus, for the message about an image that is missing."""
    timeout_s: float = TIMEOUT_S
    """How long one image waits for storage that does not answer."""

    @classmethod
    def of(
        cls, root: Folder, limits: ImageConfig, access: ImageAccess | None = None, seen: tuple[str, ...] = ()
    ) -> ImageReader:
        """The reader of a corpus; the driver looks once where its images are.

        Args:
            seen: archives anywhere in the corpus (``SourceFiles.archives``); a message names those that are not opened.

        Raises:
            ConfigError: an archive is not a zip file.
        """
        entries = {e["name"].rstrip("/").rpartition("/")[2]: e for e in _entries(root)}
        folders = [n for n, e in entries.items() if e["type"] == "directory" and _ARCHIVE_FOLDERS.match(n)]
        sizes = {n: e["size"] for n, e in entries.items() if e["type"] != "directory"}
        for folder in folders:
            sizes |= {f"{folder}/{name}": size for name, size in root.child(folder).sizes().items()}
        archives = [ZipArchive(root.uri, n, int(sizes[n])) for n in sorted(sizes) if n.lower().endswith(".zip")]
        found = tuple(archive for archive in archives if _is_usable(archive))
        opened_names = {archive.name for archive in archives}
        unopened = tuple(name for name in seen if name not in opened_names)
        return cls(root.uri, limits, access or ImageAccess(), found, _IMAGES in folders, unopened)

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the corpus that every task opens: its archives."""
        return tuple(archive.name for archive in self.archives)

    def read(self, source: str | bytes, *, near: str = "") -> bytes:
        """Encoded bytes of an image.

        Args:
            source: the bytes themselves, base64, a ``data:`` URL, a name, a path or a URI.
            near: folder of the row file, from the corpus folder.

        Raises:
            ItemError: ``image_missing``, ``image_too_large``, ``image_corrupt``, ``uri_refused``, ``url_unreachable``.
            StorageError: the store did not answer for ``timeout_s``, or does not let this job in.
        """
        if isinstance(source, bytes):
            return source
        if (inline := inline_bytes(source, self.limits)) is not None:
            return inline
        if _URL.match(source):
            return read_url(source, self.access, self.limits)

        def attempt() -> bytes:
            try:
                return self._read_uri(source) if "://" in source else self._read_name(source, near)
            except Exception as error:
                meaning = read_error(source, error)
                if isinstance(meaning, StorageError) and meaning.transient:
                    raise  # as it came: ``retry_storage`` knows the exceptions of stores
                raise meaning from error

        try:
            return retry_storage(f"image {shortened(source)!r}", attempt, timeout_s=self.timeout_s)
        except CremError:
            raise
        except Exception as error:
            raise read_error(source, error) from error

    def _read_uri(self, uri: str) -> bytes:
        *inner, place = uri.split("::")
        scheme = place.partition("://")[0].lower() if "://" in place else "file"
        if scheme in SCHEMES and all(part.lower().startswith(("zip://", "tar://")) for part in inner):
            if scheme not in ("file", "local"):
                self._roots.require_uri(place)
            else:
                real = self._roots.resolve(place.partition("://")[2] if "://" in place else place, uri)
                uri = "::".join([*inner, f"file://{real}"])
        return fetch_bytes(uri, self.limits)  # refuses the schemes that are not read

    def _read_name(self, name: str, near: str) -> bytes:
        if os.path.isabs(name):
            return self._read_path(name, name)
        for written in dict.fromkeys([name, posixpath.join(near, name)]):
            if (found := self._read_member(written)) is not None:
                return found
        is_outside = False
        for candidate in self._candidates(name, near):
            if candidate.startswith("../"):
                is_outside = True
                continue
            try:
                return self._read_path(candidate, name)
            except Exception as error:
                meaning = read_error(name, error)
                if not isinstance(meaning, ItemError) or meaning.reason != "image_missing":
                    raise
        if is_outside:
            raise ItemError("uri_refused", f"{shortened(name)!r} leads out of the corpus; copy the image into it")
        self._require_corpus()
        places = ["the corpus folder"]
        places += [f"{_IMAGES}/"] * self.has_images + [f"{len(self.archives)} zip archives"] * bool(self.archives)
        unopened = ""
        if self.unopened:
            names = ", ".join(shortened(archive, 60) for archive in self.unopened)
            unopened = f"; archives in other folders are not opened ({names}): unpack each where it is"
        raise ItemError("image_missing", f"{shortened(name)!r} does not exist in {', '.join(places)}{unopened}")

    def _candidates(self, name: str, near: str) -> Iterator[str]:
        """Paths from the corpus folder; those that lead out of it start with ``../``."""
        folders = ["", _IMAGES] if name.startswith(f"{_IMAGES}/") else [_IMAGES, ""]
        folders = [f for f in folders if f != _IMAGES or self.has_images]
        seen = set()
        for written in (name, name.replace("\\", "/")):
            for form in (written, unicodedata.normalize("NFC", written), unicodedata.normalize("NFD", written)):
                for folder in dict.fromkeys([near, *folders] if near else folders):
                    path = posixpath.normpath(posixpath.join(folder, form))
                    path = "../" if path == ".." else path
                    if path not in seen:
                        seen.add(path)
                        yield path

    def _read_path(self, path: str, name: str) -> bytes:
        """The file at a path: absolute, or from the corpus folder."""
        folder = opened(self.root)
        if os.path.isabs(path) or isinstance(folder.fs, LocalFileSystem):
            fs, place = _LOCAL, self._roots.resolve(os.path.join(folder.path(), path), name)
        else:
            fs, place = folder.fs, folder.path(path)
        data = read_file(fs, place, self.limits.max_source_bytes + 1)
        if len(data) > self.limits.max_source_bytes:
            raise too_many_bytes(len(data), self.limits)
        return data

    def _read_member(self, name: str) -> bytes | None:
        parts = name.replace("\\", "/").split("/")[:-1]

        def rank(archive: ZipArchive) -> tuple[int, str]:
            if archive.stem in parts:
                return parts.index(archive.stem), archive.name
            return len(parts) + (archive.stem != _IMAGES), archive.name

        for archive in sorted(self.archives, key=rank):
            for member in _member_names(name, archive.stem):
                if (number := archive.find(member)) is not None:
                    return archive.read(number, name, self.limits)
        return None

    def _require_corpus(self) -> None:
        """A folder that was unmounted has no images; the rows are not at fault."""
        folder = opened(self.root)
        top = folder.path(_IMAGES) if self.has_images else folder.path()
        if isinstance(folder.fs, LocalFileSystem) and not os.path.isdir(top):
            raise OSError(errno.ESTALE, f"the corpus folder {self.root} is gone; mount it again")

    @property
    def _roots(self) -> ImageRoots:
        return ImageRoots(self.root, tuple(self.access.image_roots))


def _entries(folder: Folder) -> list[dict[str, Any]]:
    try:
        return list(folder.fs.ls(folder.path(), detail=True))
    except FileNotFoundError:
        return []


def _is_usable(archive: ZipArchive) -> bool:
    """Whether an archive can be read. Another file than one of images may lie beside the rows, and be damaged."""
    try:
        archive.check()
    except (zipfile.BadZipFile, OSError) as error:
        if posixpath.basename(archive.name) == _ARCHIVE or "/" in archive.name:
            raise ConfigError(
                f"{archive.root}/{archive.name} cannot be read: {error}; write the archive again, or move it away"
            ) from error
        log.warning("%s/%s is no zip archive (%s); no image is sought in it", archive.root, archive.name, error)
        return False
    return True


def _member_names(name: str, stem: str) -> list[str]:
    """The names that a member may have, from the one that is written on."""
    plain = posixpath.normpath(name.replace("\\", "/"))
    if plain.startswith("../"):
        return []
    bare = plain.removeprefix(f"{_IMAGES}/")
    within = bare.removeprefix(f"{stem}/")
    return list(
        dict.fromkeys([plain, f"{_IMAGES}/{plain}", bare, within, f"{stem}/{bare}", f"{_IMAGES}/{stem}/{bare}"])
    )
