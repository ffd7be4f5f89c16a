"""Image folders of Hugging Face with their metadata, and captions of COCO.

Source: Hugging Face's guide "Create an image dataset": ``metadata.jsonl``, ``.csv`` or ``.parquet`` has ``file_name``,
``file_names`` or ``NAME_file_name``, paths from the folder of that file, and any other columns, which are read as those
of ``table``. COCO's captions name their image by ``file_name`` too; its folder is the second word of the annotation
file (``captions_train2017.json``).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace

from pipelines.formats.cells import parse_images
from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.placeholders import ImageName
from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.formats.table import IMAGES, ImageTable, caption_item, caption_rows, first_images, lower_case
from pipelines.sources.records import RawRecord

__all__ = ["ImageFolder"]

_FILE_NAME = re.compile(r"(?:(?P<part>.+)_)?file_names?")
_TABLE = ImageTable()
_TARGETS = frozenset(("target", "output", "positive", "pos", "edited", "after", "document"))
_NEGATIVES = frozenset(("negative", "neg"))
_MEANINGS = {"query": "query image", "target": "target image", "negative": "image of a negative"}
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
            "file_name",
            *(name for name in IMAGES[len(_INLINE) :] if name not in ("path", "file")),
        ),
        *_TABLE.alternatives[1:],
    )
    pairs = False

    def column(self, name: str) -> Column | None:
        found = _FILE_NAME.fullmatch(name)
        if found is None:
            return _TABLE.column(name)
        return Column(name, _MEANINGS[_side(name)])

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return any(_FILE_NAME.fullmatch(name) for name in columns)

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        images = {side: _images(record, side, context) for side in _MEANINGS}
        rows = caption_rows(lower_case(record), _query_images(record, context), context)
        if not images["target"] and not images["negative"]:
            return rows
        negatives = tuple(RawItem(None, (image,), None) for image in images["negative"])
        return [_between_images(row, images["target"], negatives) for row in rows]

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        if context.side == "target" and (images := _images(record, "target", context)):
            return RawItem(None, images, None)
        return caption_item(lower_case(record), _query_images(record, context), context)


def _between_images(row: RawRow, target: tuple[ImageName, ...], negatives: tuple[RawItem, ...]) -> RawRow:
    """A pair of images: the caption says what turns the one into the other, and so belongs to the query."""
    if not target:
        return replace(row, negatives=negatives)
    query = RawItem(row.target.text, row.query.images, None)
    return replace(row, query=query, target=RawItem(None, target, None), negatives=negatives)


def _side(name: str) -> str:
    found = _FILE_NAME.fullmatch(name)
    part = (found and found["part"]) or ""
    return "target" if part.lower() in _TARGETS else "negative" if part.lower() in _NEGATIVES else "query"


def _images(record: RawRecord, side: str, context: RowContext) -> tuple[ImageName, ...]:
    """The images of a side, in the order of the columns, as paths from the folder of the corpus."""
    names = [name for name in record if _FILE_NAME.fullmatch(name) and _side(name) == side]
    found = (image for name in names for image in parse_images(record[name], name))
    return tuple(_placed(image, record, context.file) for image in found)


def _query_images(record: RawRecord, context: RowContext) -> tuple[ImageName, ...]:
    values = lower_case(record)
    return first_images(values, _INLINE) or _images(record, "query", context) or first_images(values, IMAGES)


def _placed(image: ImageName, record: RawRecord, file: str) -> ImageName:
    if isinstance(image, bytes) or "://" in image or image.startswith(("/", "data:")):
        return image
    folder, name = posixpath.split(file)
    coco = re.fullmatch(r"captions_(\w+)\.json.*", name) if "image_id" in record else None
    if coco:
        folder = coco[1]
    return posixpath.normpath(posixpath.join(folder, image))
