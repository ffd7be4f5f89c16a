"""What a format is: the columns that a publisher writes, how to recognise them, and the rows that a record means.

A format is one small module with one object of this protocol; ``registry`` lists them. It is pure: it opens no file
and decodes no image. The containers (Parquet, JSON, CSV, tar, Lance …) are read by ``pipelines.sources``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from pipelines.formats.paths import is_split
from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.sources.records import RawRecord

__all__ = ["Column", "Format", "RowContext", "Side"]

Side: TypeAlias = Literal["query", "target"]


@dataclass(frozen=True)
class Column:
    """A column of a format."""

    name: str
    meaning: str
    """What it becomes, in a few words: ``query image``, ``target text``; or why it is not read: ``a licence``."""
    used: bool = True
    """Whether it is read; one that is not is declared, so that it is not reported as unknown."""


_SPLIT = Column("split", "split")


@dataclass(frozen=True)
class RowContext:
    """What a record does not say about itself."""

    source: str
    """Name of the corpus: the source of a row that has none."""
    key: str
    """Key of a row that has none."""
    file: str = ""
    """The file that holds the record, from the folder of the corpus: folders name sub-datasets."""
    split: str = "train"
    """Split of the row (``paths.split_of``)."""
    side: Side | None = None
    """The side that ``item`` is to give, of a record that has two."""


class Format(Protocol):
    """A layout that publishers use. A format is a subclass, and takes ``column`` and ``names`` from here."""

    name: str
    """As ``prepare.format`` and ``crem inspect`` name it."""
    title: str
    """As people call it, with its publisher."""
    columns: tuple[Column, ...]
    """All that the format declares. Any other column of a table is unknown, and is said to be."""
    pairs: bool
    """Whether a record has two sides, so that ``item`` needs ``context.side``."""

    alternatives: tuple[tuple[str, ...], ...] = ()
    """Columns of which only the first that is not empty is read, in this order and in lower case."""

    def preferred(self, name: str, names: Sequence[str]) -> str | None:
        """The column of ``names`` that is read before this one, which is then read only where that is empty."""
        for group in self.alternatives:
            if name.lower() in group:
                places = {other: group.index(other.lower()) for other in names if other.lower() in group}
                first = min(places, key=places.__getitem__, default=name)
                return None if first == name else first
        return None

    def column(self, name: str) -> Column | None:
        """The column of this name, or None where the format does not know it. All know ``split``, in any case."""
        found = next((column for column in self.columns if column.name == name), None)
        return _SPLIT if found is None and is_split(name) else found

    def names(self, record: RawRecord) -> Sequence[str]:
        """The names of what a record holds, to be told from unknown ones."""
        return tuple(record)

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
