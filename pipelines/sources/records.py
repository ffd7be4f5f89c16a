"""What passes between the readers of row files and the jobs: files, ranges of rows, and the records in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from crem.errors import ConfigError

__all__ = ["FileSchema", "FileStamp", "Ignored", "ParsedRow", "RawRecord", "RowRange", "SourceRow", "unreadable_file"]

RawRecord: TypeAlias = dict[str, Any]
"""One row of a user's table by column; nothing about its values is known yet."""

ParsedRow: TypeAlias = tuple[RawRecord | None, str]
"""A record and the empty string, or ``None`` and why the row cannot be parsed."""


@dataclass(frozen=True)
class FileStamp:
    """Identifies the content of an input file: two runs with equal stamps read the same rows."""

    file: str
    size: int
    """Bytes."""
    version: str
    """Entity tag, or time of the last change in nanoseconds."""


@dataclass(frozen=True)
class FileSchema:
    """What a file says of its columns."""

    columns: tuple[str, ...]
    """Their names; of a container without a schema, those of its first rows."""


@dataclass(frozen=True)
class Ignored:
    """Files of one kind that are in the folder and are not read."""

    kind: str
    """``images``, ``archives``, ``hidden``, ``metadata``, ``unknown`` …"""
    why: str
    count: int
    """Files; of a folder that was not entered, one."""
    names: tuple[str, ...]
    """The first few."""
    expected: bool
    """Whether a corpus usually has such files beside its rows, so that they need no warning."""


@dataclass(frozen=True)
class RowRange:
    """Rows ``first`` to ``first + rows - 1`` of one file, where a reader finds them, and the file as it was then."""

    folder: str
    """URI of the folder that was listed."""
    file: str
    """Path of the file from there."""
    container: str
    """Name of the container that reads it."""
    size: int
    version: str
    """``FileStamp`` of the file when it was split."""
    fingerprint: str
    """Of the file's content; part of the key of a row that has none."""
    first: int
    rows: int
    row_groups: tuple[int, ...] = ()
    """Parquet: the groups that hold them. Lance: the fragment."""
    skip: int = 0
    """Rows to pass over, from where reading begins, before the first."""
    offset: int = 0
    """Byte of the (decompressed) file at which reading begins."""
    end: int = 0
    """Byte at which reading stops; 0 where it is not known. Tar: 0 where the members of the rows are scattered."""
    aside: int = -1
    """COCO: byte of the first of the images that its annotations refer to."""
    within: str = ""
    """JSON: the name of the list that holds them, where the document is an object."""
    after: str = ""
    """Folder of images: the name of the one before the first, if there is one."""

    @property
    def stamp(self) -> FileStamp:
        return FileStamp(self.file, self.size, self.version)

    @property
    def uri(self) -> str:
        return f"{self.folder}/{self.file}"


@dataclass(frozen=True)
class SourceRow:
    """One row of a file."""

    name: str
    """``@<fingerprint of the file's content>/<file>#<number of the row in it>``: the key of a row that has none.

    It stays when the corpus is moved or its folder renamed, and differs between corpora whose files are named alike.
    ``schema.row_id`` therefore leaves the source out of the id of such a key.
    """
    record: RawRecord | None
    """``None`` where the row cannot be parsed."""
    parse_error: str = ""
    file: str = ""
    """Path of the file, from the folder that was listed."""
    within: str = ""
    """Of ``RowRange``."""

    @property
    def folder(self) -> str:
        """Folder of the file, from the folder that was listed: where an imagefolder's ``file_name`` starts."""
        return self.file.rpartition("/")[0]


def unreadable_file(folder: str, name: str, error: Exception | str) -> ConfigError:
    """The error of a row file that is damaged. It stops a job, because the number of its rows is unknown."""
    what = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return ConfigError(f"{folder}/{name} cannot be read: {what}; replace it or take it out of the folder")
