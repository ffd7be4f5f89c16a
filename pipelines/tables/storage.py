"""Output folders on any file system that fsspec knows: local paths, and ``s3://`` through s3fs.

Credentials come from the environment alone (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``).
Every job writes into a folder of its own and *claims* it first. It may use an empty folder, or one that an earlier run
of the same kind of job left; anything else is refused, so that no job ever deletes what it did not write. Object stores
have no rename and no folders, so neither tells whether an output is complete: ``manifest.json`` (or another summary) is
written last, in one piece, and its presence means complete.

A folder made by ``patient`` waits for storage that fails for a while (``storage_retry``). Writing is atomic, so each
operation can be tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import IO, Any, NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from crem.errors import ConfigError, CremError, StorageError
from pipelines.tables.storage_retry import CREDENTIALS, require_storage

__all__ = ["CLAIM", "Folder", "JobKind"]

CLAIM = "_crem.json"
"""Written first into every output folder: the kind of job that owns it. No job removes it."""
_T = TypeVar("_T")


class JobKind(StrEnum):
    """The kinds of job that own an output folder, each named after its sub-command."""

    PREPARE = "prepare"
    SYNTHESISE = "synthesise"
    MINE = "mine"
    TRAIN = "train"
    EMBED = "embed"
    INDEX = "index"
    EVALUATE = "evaluate"
    ABLATE = "ablate"
    DEMO = "demo"


class _Entry(NamedTuple):
    """A file or folder of a folder."""

    name: str
    size: int
    is_folder: bool


def _local_entry(entry: os.DirEntry[str]) -> _Entry | None:
    try:
        if entry.is_dir():
            return _Entry(entry.name, 0, True)
        return _Entry(entry.name, entry.stat().st_size, False) if entry.is_file() else None
    except FileNotFoundError:  # removed just now
        return None


@dataclass(frozen=True)
class Folder:
    """A folder at a path or URI. Pickles as its fields; each process opens its own connection."""

    uri: str
    patience_s: float = 0.0
    """How long an operation is tried again while the storage fails."""

    @classmethod
    def at(cls, place: str | os.PathLike[str]) -> Folder:
        """The folder at a path or URI. Local paths become absolute, because workers have other working directories.

        Raises:
            ConfigError: ``place`` is empty, as from a variable of a shell that is not set.
        """
        text = os.fspath(place)
        if not text.strip():
            raise ConfigError(f"the name of a folder, {text!r}, is empty; give a path or a URI, or '.' for this folder")
        if "://" not in text:
            return cls(os.path.abspath(os.path.expanduser(text)))
        return cls(text.rstrip("/"))

    @cached_property
    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        # never cache listings: other processes write into these folders
        options: dict[str, Any] = {} if "://" not in self.uri else {"use_listings_cache": False}
        if self.patience_s and self.uri.startswith(("s3://", "s3a://")):  # the folder's own attempts, not botocore's
            options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 2}}
        try:
            return fsspec.core.url_to_fs(self.uri, **options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{self.uri!r} cannot be opened: {error}; use a path or an s3:// URI") from error

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._opened[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "patience_s": self.patience_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def patient(self, patience_s: float) -> Folder:
        """This folder, whose operations wait so long for storage that fails.

        Raises, in each operation:
            StorageError: the storage did not answer in all that time. ConfigError: access is denied.
        """
        return Folder(self.uri, patience_s)

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rpartition("/")[2]

    def path(self, *parts: str) -> str:
        """The path of a file in this folder, in the form that ``fs`` takes."""
        return "/".join([self._opened[1].rstrip("/"), *parts])

    def child(self, name: str) -> Folder:
        return Folder(f"{self.uri.rstrip('/')}/{name}", self.patience_s)

    def _call(self, doing: str, call: Callable[[], _T], *parts: str) -> _T:
        """The result of an operation on a file of this folder, with the folder's patience."""
        if not self.patience_s:
            return call()
        return require_storage(f"{doing} {'/'.join([self.uri, *parts])}", call, timeout_s=self.patience_s)

    def exists(self, *parts: str) -> bool:
        """Whether the file or folder is there.

        Raises:
            ConfigError: access is denied.
        """
        with self._denial_explained():
            return bool(self._call("looking for", lambda: self.fs.exists(self.path(*parts)), *parts))

    def is_file(self) -> bool:
        """Whether what is here is a file and no folder."""
        return bool(self._call("looking for", lambda: self.fs.isfile(self.path())))

    def files(self, *suffixes: str) -> list[str]:
        """Names of the files directly in this folder that end in one of ``suffixes``, sorted."""
        return [name for name in self.sizes() if not suffixes or name.lower().endswith(suffixes)]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file directly in this folder, by its name; names are sorted."""
        found = ((entry.name, entry.size) for entry in self._entries() if not entry.is_folder)
        return dict(sorted(found))

    def folders(self) -> list[str]:
        """Names of the folders directly in this folder, sorted."""
        return sorted(entry.name for entry in self._entries() if entry.is_folder)

    def _entries(self) -> Iterator[_Entry]:
        """What is directly in this folder; of large ones a page at a time is in memory."""
        try:
            if isinstance(self.fs, LocalFileSystem):
                with self._call("listing", lambda: os.scandir(self.path())) as entries:
                    yield from filter(None, map(_local_entry, entries))
            elif hasattr(self.fs, "call_s3"):
                for page in self._s3_pages():
                    yield from page
            else:
                for found in self._call("listing", lambda: self.fs.ls(self.path(), detail=True)):
                    name = found["name"].rstrip("/").rpartition("/")[2]
                    yield _Entry(name, int(found["size"] or 0), found["type"] == "directory")
        except (FileNotFoundError, NotADirectoryError):
            return

    def _s3_pages(self) -> Iterator[list[_Entry]]:
        bucket, _, prefix = self.path().partition("/")
        prefix = f"{prefix}/" if prefix else ""
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
        while True:
            page = self._call("listing", lambda: self.fs.call_s3("list_objects_v2", **request))
            files = [_Entry(e["Key"].removeprefix(prefix), e["Size"], False) for e in page.get("Contents", ())]
            folders = [e["Prefix"].removeprefix(prefix).rstrip("/") for e in page.get("CommonPrefixes", ())]
            yield [entry for entry in files if entry.name] + [_Entry(name, 0, True) for name in folders]
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def upload(self, local: str, *parts: str) -> None:
        """Copy a local file into this folder; on an object store it appears only when complete."""
        self._make_parents(self.path(*parts))
        self._call("writing", lambda: self.fs.put_file(local, self.path(*parts)), *parts)

    def download(self, local: str, *parts: str) -> None:
        """Copy a file of this folder to a local path."""
        self._call("reading", lambda: self.fs.get_file(self.path(*parts), local), *parts)

    def open(self, *parts: str, mode: str = "rb") -> IO[bytes]:
        """Open a file; mode ``wb`` creates the folders above it. Reads and writes of the file have no patience."""
        path = self.path(*parts)
        if "w" in mode:
            self._make_parents(path)
        opened: IO[bytes] = self._call("opening", lambda: self.fs.open(path, mode), *parts)
        return opened

    def read_bytes(self, *parts: str) -> bytes:
        """The content of a file."""
        with self._denial_explained():
            return bytes(self._call("reading", lambda: self.fs.cat_file(self.path(*parts)), *parts))

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Write a file atomically: a reader sees all of it or nothing."""

        def write() -> None:
            if isinstance(self.fs, LocalFileSystem):
                with self._local_file(path) as file:
                    file.write(data)
            else:
                self.fs.pipe_file(path, data)  # one PUT, or a multipart upload that appears when it is completed

        path = self.path(*parts)
        self._make_parents(path)
        self._call("writing", write, *parts)

    def write_stream(self, write: Callable[[IO[bytes]], _T], *parts: str) -> _T:
        """Write a file atomically, a piece at a time; ``write`` may be called again, with a new file."""

        def attempt() -> _T:
            if isinstance(self.fs, LocalFileSystem):
                with self._local_file(path) as file:
                    return write(file)
            file = self.fs.open(path, "wb")
            try:
                value = write(file)
            except BaseException:
                with contextlib.suppress(Exception):  # what was sent is dropped, so that no half of a file appears
                    file.discard()
                file.closed = True  # the collector closes an open file, which would send the rest
                raise
            file.close()
            return value

        path = self.path(*parts)
        self._make_parents(path)
        return self._call("writing", attempt, *parts)

    @staticmethod
    @contextmanager
    def _local_file(path: str) -> Iterator[IO[bytes]]:
        partial = f"{path}.{uuid.uuid4().hex}.partial"
        try:
            with open(partial, "wb") as file:
                yield file
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    def write_json(self, value: Any, *parts: str) -> None:
        self.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), *parts)

    def read_json(self, *parts: str) -> Any | None:
        """The parsed file, or ``None`` where it is missing or not JSON.

        Raises:
            ConfigError: access is denied.
        """
        try:
            with self._denial_explained():
                return json.loads(self._call("reading", lambda: self.fs.cat_file(self.path(*parts)), *parts))
        except FileNotFoundError:
            return None
        except (ValueError, IsADirectoryError, NotADirectoryError):
            return None

    def remove(self, *parts: str) -> None:
        """Remove a file or a folder in this folder, if it exists."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):  # another process, or an attempt before this one, was faster
                if self.fs.exists(path):
                    self.fs.rm(path, recursive=True)

        path = self.path(*parts)
        self._call("removing", remove, *parts)

    def move(self, source: str, target: str) -> None:
        """Rename within this folder (a server-side copy on an object store). A retried task may call it again."""

        def move() -> None:
            if self.fs.exists(self.path(source)) or not self.fs.exists(self.path(target)):
                self.fs.mv(self.path(source), self.path(target))

        self._make_parents(self.path(target))
        self._call("moving", move, source)

    def _make_parents(self, path: str) -> None:
        """Create the folders above a local file. An object store needs none, and s3fs would create a missing bucket."""
        if isinstance(self.fs, LocalFileSystem):
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _denial_explained(self) -> Iterator[None]:
        """Turn missing or rejected credentials, of whichever store, into an error with the remedy."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, PermissionError) and "Credential" not in type(error).__name__:
                raise
            raise ConfigError(f"{self.uri} may not be read: {error}; {CREDENTIALS}") from error

    def claim(self, kind: JobKind) -> None:
        """Make this folder the output of a job of ``kind``.

        Raises:
            ConfigError: the folder holds something that no job of this kind wrote, or cannot be written.
            StorageError: the storage stays away from a folder that has patience.
        """
        try:
            if self.is_file():
                raise ConfigError(f"{self.uri} is a file; give --out a folder")
            owner = self.read_json(CLAIM)
            if isinstance(owner, dict) and owner.get("kind") == kind:
                return
            existing = [entry.name for entry in self._entries()]
        except CremError:
            raise
        except Exception as error:  # of botocore or of the operating system
            raise ConfigError(
                f"{self.uri} cannot be read: {error}; choose an output folder of yours, and {CREDENTIALS}"
            ) from error
        if existing:
            content = f"output of crem {owner['kind']}" if isinstance(owner, dict) and "kind" in owner else "files"
            raise ConfigError(
                f"{self.uri} holds {content} that crem {kind} did not write ({', '.join(sorted(existing)[:4])}); "
                "choose an empty or new folder, or remove it yourself"
            )
        try:
            self.write_json({"kind": kind}, CLAIM)
        except StorageError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{self.uri} cannot be written: {error}; choose a folder of yours, and {CREDENTIALS}"
            ) from error
