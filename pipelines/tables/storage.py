"""Output folders on any file system that fsspec knows: local paths, and ``s3://`` through s3fs.

Credentials come from the environment alone (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``).
Every job writes into a folder of its own and *claims* it first. It may use an empty folder, or one that an earlier run
of the same kind of job left; anything else is refused, so that no job ever deletes what it did not write. Object stores
have no rename and no folders, so neither tells whether an output is complete: ``manifest.json`` (or another summary) is
written last, in one piece, and its presence means complete.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from crem.errors import ConfigError

__all__ = ["CLAIM", "Folder", "JobKind"]

CLAIM = "_crem.json"
"""Written first into every output folder: the kind of job that owns it. No job removes it."""
_CREDENTIALS = (
    "for s3:// set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION "
    "and, for another S3 than Amazon's, AWS_ENDPOINT_URL"
)


class JobKind(StrEnum):
    """The kinds of job that own an output folder, each named after its sub-command."""

    PREPARE = "prepare"
    TRAIN = "train"
    EMBED = "embed"
    INDEX = "index"
    EVALUATE = "evaluate"
    ABLATE = "ablate"
    DEMO = "demo"


@dataclass(frozen=True)
class Folder:
    """A folder at a path or URI. Pickles as its URI; each process opens its own connection."""

    uri: str

    @classmethod
    def at(cls, place: str | os.PathLike[str]) -> Folder:
        """The folder at a path or URI. Local paths become absolute, because workers have other working directories."""
        text = os.fspath(place)
        if "://" not in text:
            return cls(os.path.abspath(os.path.expanduser(text)))
        return cls(text.rstrip("/"))

    @cached_property
    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        # never cache listings: other processes write into these folders
        options = {} if "://" not in self.uri else {"use_listings_cache": False}
        try:
            return fsspec.core.url_to_fs(self.uri, **options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{self.uri!r} cannot be opened: {error}; use a path or an s3:// URI") from error

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._opened[0]

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "uri", state["uri"])

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
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def exists(self, *parts: str) -> bool:
        """Whether the file or folder is there.

        Raises:
            ConfigError: access is denied.
        """
        with self._denial_explained():
            return bool(self.fs.exists(self.path(*parts)))

    def files(self, *suffixes: str) -> list[str]:
        """Names of the files directly in this folder that end in one of ``suffixes``, sorted."""
        try:
            entries = self.fs.ls(self.path(), detail=True)
        except FileNotFoundError:
            return []
        names = (e["name"].rpartition("/")[2] for e in entries if e["type"] == "file")
        return sorted(n for n in names if n and (not suffixes or n.lower().endswith(suffixes)))

    def folders(self) -> list[str]:
        """Names of the folders directly in this folder, sorted."""
        try:
            entries = self.fs.ls(self.path(), detail=True)
        except FileNotFoundError:
            return []
        names = (e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "directory")
        return sorted(n for n in names if n)

    def upload(self, local: str, *parts: str) -> None:
        """Copy a local file into this folder; on an object store it appears only when complete."""
        self._make_parents(self.path(*parts))
        self.fs.put_file(local, self.path(*parts))

    def download(self, local: str, *parts: str) -> None:
        """Copy a file of this folder to a local path."""
        self.fs.get_file(self.path(*parts), local)

    def open(self, *parts: str, mode: str = "rb") -> IO[bytes]:
        """Open a file; mode ``wb`` creates the folders above it."""
        path = self.path(*parts)
        if "w" in mode:
            self._make_parents(path)
        return self.fs.open(path, mode)  # type: ignore[no-any-return]

    def read_bytes(self, *parts: str) -> bytes:
        """The content of a file."""
        with self._denial_explained():
            return bytes(self.fs.cat_file(self.path(*parts)))

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Write a file atomically: a reader sees all of it or nothing."""
        path = self.path(*parts)
        self._make_parents(path)
        if not self.is_local:
            self.fs.pipe_file(path, data)  # one PUT, or a multipart upload that appears when it is completed
            return
        partial = f"{path}.{uuid.uuid4().hex}.partial"
        try:
            with open(partial, "wb") as file:
                file.write(data)
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
                return json.loads(self.fs.cat_file(self.path(*parts)))
        except FileNotFoundError:
            return None
        except (ValueError, IsADirectoryError):
            return None

    def remove(self, *parts: str) -> None:
        """Remove a file or a folder in this folder, if it exists."""
        path = self.path(*parts)
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)

    def move(self, source: str, target: str) -> None:
        """Rename within this folder (a server-side copy on an object store). A retried task may call it again."""
        if not self.exists(source) and self.exists(target):
            return
        self._make_parents(self.path(target))
        self.fs.mv(self.path(source), self.path(target))

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
            raise ConfigError(f"{self.uri} may not be read: {error}; {_CREDENTIALS}") from error

    def claim(self, kind: JobKind) -> None:
        """Make this folder the output of a job of ``kind``.

        Raises:
            ConfigError: the folder holds something that no job of this kind wrote, or cannot be written.
        """
        try:
            if self.fs.isfile(self.path()):
                raise ConfigError(f"{self.uri} is a file; give --out a folder")
            owner = self.read_json(CLAIM)
            if isinstance(owner, dict) and owner.get("kind") == kind:
                return
            existing = [e.rpartition("/")[2] for e in self.fs.ls(self.path(), detail=False)] if self.exists() else []
        except FileNotFoundError:
            owner, existing = None, []
        except ConfigError:
            raise
        except Exception as error:  # of botocore or of the operating system
            raise ConfigError(
                f"{self.uri} cannot be read: {error}; choose an output folder of yours, and {_CREDENTIALS}"
            ) from error
        existing = [name for name in existing if name]
        if existing:
            content = f"output of crem {owner['kind']}" if isinstance(owner, dict) and "kind" in owner else "files"
            raise ConfigError(
                f"{self.uri} holds {content} that crem {kind} did not write ({', '.join(sorted(existing)[:4])}); "
                "choose an empty or new folder, or remove it yourself"
            )
        try:
            self.write_json({"kind": kind}, CLAIM)
        except Exception as error:
            raise ConfigError(
                f"{self.uri} cannot be written: {error}; choose a folder of yours, and {_CREDENTIALS}"
            ) from error
