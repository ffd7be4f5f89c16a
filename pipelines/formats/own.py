"""Our own rows: a query, a target, negatives and a generation turn, one column for each part (``raw_rows``).

A text with images may say by marks such as ``<image>`` where they stand (``placeholders``). A text without images is
never changed: who writes ``<image>`` there means the word.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.raw_rows import COLUMNS, RawItem, RawRow, parse_row
from pipelines.sources.records import RawRecord

__all__ = ["OwnRows"]

_DISTINCTIVE = frozenset(c for c in COLUMNS if c.startswith(("query_", "target_"))) | {"negatives"}
"""The rest (``key``, ``source``, ``question`` …) are words that others use too."""


class OwnRows(Format):
    """Rows in the columns that this project documents."""

    name = "crem"
    title = "rows of this project"
    columns = tuple(Column(name, name.replace("_", " ")) for name in COLUMNS)
    pairs = True

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return not columns.isdisjoint(_DISTINCTIVE)

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        return [parse_row(record, key=context.key, source=context.source)]

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        row = parse_row(record, key=context.key, source=context.source)
        return row.target if context.side == "target" else row.query
