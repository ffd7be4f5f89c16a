"""Our own rows: a query, a target, negatives and a generation turn, one column for each part (``raw_rows``).

A text with images may say by marks such as ``<image>`` where they stand (``placeholders``). A text without images is
never changed: who writes ``<image>`` there means the word.
"""

from __future__ import annotations

from collections.abc import Sequence

from crem.errors import ItemError
from pipelines.formats.cells import is_blank, listed
from pipelines.formats.file_names import named_column, named_images
from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.raw_rows import COLUMNS, NEGATIVE, RawItem, RawRow, negatives_of, parse_row
from pipelines.sources.records import RawRecord

__all__ = ["OwnRows"]

_DISTINCTIVE = frozenset(c for c in COLUMNS if c.startswith(("query_", "target_"))) | {"negatives"}
"""The rest (``key``, ``source``, ``question`` …) are words that others use too."""

_INNER = "negatives[]."
"""Before the name of what an object in ``negatives`` holds."""


class OwnRows(Format):
    """Rows in the columns that this project documents."""

    name = "crem"
    title = "rows of this project"
    columns = (
        *(Column(name, name.replace("_", " ")) for name in COLUMNS),
        *(Column(f"{_INNER}{name}", f"{name} of a negative") for name in NEGATIVE),
    )
    pairs = True

    def column(self, name: str) -> Column | None:
        return super().column(name) or named_column(name, "query", "target")

    def names(self, record: RawRecord) -> Sequence[str]:
        """Also those in ``negatives``; of objects with unknown ones, only what each of them has."""
        try:
            negatives = negatives_of(record.get("negatives"))
        except ItemError:
            return tuple(record)  # the row is rejected where it is read
        filled = [frozenset(str(name) for name, cell in n.items() if not is_blank(cell)) for n in negatives]
        odd = [names for names in filled if not names.issubset(NEGATIVE)]
        inner = frozenset().union(*(odd or filled))
        if odd:
            inner -= frozenset(NEGATIVE) - frozenset.intersection(*odd)
        return (*record, *(f"{_INNER}{name}" for name in sorted(inner)))

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return not columns.isdisjoint(_DISTINCTIVE)

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        return [parse_row(_with_named(record, context), key=context.key, source=context.source, split=context.split)]

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        row = parse_row(_with_named(record, context), key=context.key, source=context.source)
        return row.target if context.side == "target" else row.query


def _with_named(record: RawRecord, context: RowContext) -> RawRecord:
    """The record with the files that ``file_name`` and ``target_file_name`` name, where a side gives no images."""
    named = {
        "query_images": named_images(record, context, "query"),
        "target_images": named_images(record, context, "target"),
    }
    return record | {name: images for name, images in named.items() if images and is_blank(listed(record.get(name)))}
