"""What a format is: the columns that a publisher writes, how to recognise them, and the rows that a record means.

A format is one small module with one object of this protocol; ``registry`` lists them. It is pure: it opens no file
and decodes no image. The containers (Parquet, JSON, CSV, tar, Lance …) are read by ``pipelines.sources``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.sources.records import RawRecord

__all__ = ["Column", "Format", "RowContext"]


@dataclass(frozen=True)
class Column:
    """A column of a format."""

    name: str
    meaning: str
    """What it becomes, in a few words: ``query image``, ``target text``, ``ignored: licence``."""


@dataclass(frozen=True)
class RowContext:
    """What a record does not say about itself."""

    source: str
    """Name of the corpus: the source of a row that has none."""
    key: str
    """Key of a row that has none."""


class Format(Protocol):
    """A layout that publishers use."""

    name: str
    """As ``prepare.format`` and ``crem inspect`` name it."""
    title: str
    """As people call it, with its publisher."""
    columns: tuple[Column, ...]
    """All that the format declares. Any other column of a table is unknown, and is said to be."""

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        """Whether a table with these columns, and these first records, is of this format."""

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        """The rows of a record: at least one.

        Raises:
            ItemError: the record is bad; it becomes one rejected row.
        """

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        """The one item of a record, for a job that embeds items.

        Raises:
            ItemError: the record is bad, or holds no item.
        """
