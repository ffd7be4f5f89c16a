"""Image folders of Hugging Face with their metadata, and captions of COCO.

Source: Hugging Face's guide "Create an image dataset": ``metadata.jsonl``, ``.csv`` or ``.parquet`` has ``file_name``,
``file_names`` or ``NAME_file_name``, paths from the folder of that file, and any other columns, which are read as those
of ``table``. COCO's captions name their image by ``file_name`` too (``file_names``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipelines.formats.file_names import NAMED, named_column, named_images, named_side
from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.placeholders import ImageName
from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.formats.table import IMAGES, ImageTable, caption_item, caption_rows, first_images, lower_case
from pipelines.sources.records import RawRecord

__all__ = ["ImageFolder"]

_TABLE = ImageTable()
_INLINE = IMAGES[: IMAGES.index("image_path")]
"""Columns that may hold the image itself, which then goes before its name."""


class ImageFolder(Format):
    """Rows that name the files of their images."""

    name = "imagefolder"
    title = "an image folder of Hugging Face, or captions of COCO"
    columns = (
        Column("file_name", "query image"),
        Column("file_names", "query images"),
        Column("target_file_name", "target image, and so are output_, positive_, edited_ and after_file_name"),
        Column("negative_file_name", "image of a negative"),
        *(column for column in _TABLE.columns if column.name not in ("path", "file")),
    )
    alternatives = (
        (
            *_INLINE,
            *NAMED,
            *(name for name in IMAGES[len(_INLINE) :] if name not in ("path", "file")),
        ),
        *_TABLE.alternatives[1:],
    )
    pairs = False

    def column(self, name: str) -> Column | None:
        return named_column(name) or _TABLE.column(name)

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return any(map(named_side, columns))

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        targets, negatives = (named_images(record, context, side) for side in ("target", "negative"))
        rows = caption_rows(lower_case(record), _query_images(record, context), context)
        if not targets and not negatives:
            return rows
        return [_between_images(row, targets, tuple(RawItem(None, (n,), None) for n in negatives)) for row in rows]

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        if context.side == "target" and (images := named_images(record, context, "target")):
            return RawItem(None, images, None)
        return caption_item(lower_case(record), _query_images(record, context), context)


def _between_images(row: RawRow, target: tuple[ImageName, ...], negatives: tuple[RawItem, ...]) -> RawRow:
    """A pair of images: the caption says what turns the one into the other, and so belongs to the query."""
    if not target:
        return replace(row, negatives=negatives)
    query = RawItem(row.target.text, row.query.images, None)
    return replace(row, query=query, target=RawItem(None, target, None), negatives=negatives)


def _query_images(record: RawRecord, context: RowContext) -> tuple[ImageName, ...]:
    values = lower_case(record)
    return first_images(values, _INLINE) or named_images(record, context, "query") or first_images(values, IMAGES)
