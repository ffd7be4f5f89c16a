"""What passes between the readers of row files and the jobs: ranges of rows, and the records in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from crem.errors import ConfigError

__all__ = ["ParsedRow", "RawRecord", "RowRange", "SourceRow", "unreadable_file"]

RawRecord: TypeAlias = dict[str, Any]
"""One row of a user's table by column; nothing about its values is known yet."""

ParsedRow: TypeAlias = tuple[RawRecord | None, str]
"""A record and the empty string, or ``None`` and why the row cannot be parsed."""


@dataclass(frozen=True)
class RowRange:
    """Rows ``first`` to ``first + rows - 1`` of one file, and where a reader finds them."""

    folder: str
    """URI of the folder that holds the file."""
    file: str
    first: int
    rows: int
    row_groups: tuple[int, ...] = ()
    """Parquet: the groups that hold them."""
    skip: int = 0
    """Parquet: rows of the first group that belong to the range before. Gzip: non-blank lines before the first."""
    offset: int = 0
    """JSONL: byte offset of the first line."""


@dataclass(frozen=True)
class SourceRow:
    """One row of a file."""

    name: str
    """``<file>#<number of the row in it>``: the key of a row that has none."""
    record: RawRecord | None
    """``None`` where the row cannot be parsed."""
    parse_error: str = ""


def unreadable_file(folder: str, name: str, error: Exception) -> ConfigError:
    """The error of a row file that cannot be read. It stops a job, because the number of its rows is unknown."""
    return ConfigError(
        f"{folder}/{name} cannot be read: {type(error).__name__}: {error}; replace it or take it out of the folder"
    )
