"""Our own rows: a query, a target, negatives and a generation turn, one column for each part (``raw_rows``)."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.formats.format import Column, RowContext
from pipelines.formats.raw_rows import COLUMNS, RawItem, RawRow, parse_row
from pipelines.sources.records import RawRecord

__all__ = ["OwnRows"]


class OwnRows:
    """Rows in the columns that this project documents."""

    name = "crem"
    title = "rows of this project"
    columns = tuple(Column(name, name.replace("_", " ")) for name in COLUMNS)

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return not columns.isdisjoint(COLUMNS)

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        return [parse_row(record, key=context.key, source=context.source)]

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        return parse_row(record, key=context.key, source=context.source).query
