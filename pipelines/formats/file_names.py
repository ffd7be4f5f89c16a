"""Columns of Hugging Face's image folders that name files: ``file_name``, ``file_names`` and ``NAME_file_name``.

Source: Hugging Face's guide "Create an image dataset". The names are paths from the folder of the metadata file,
whatever else its rows hold: captions, questions, conversations. COCO's captions name their image by ``file_name`` too;
its folder is the second word of the annotation file (``captions_train2017.json``).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from pipelines.formats.cells import parse_images
from pipelines.formats.format import Column, RowContext
from pipelines.formats.placeholders import ImageName
from pipelines.sources.records import RawRecord

__all__ = ["NAMED", "NamedSide", "first_or_named", "named_column", "named_images", "named_side"]

NamedSide: TypeAlias = Literal["query", "target", "negative"]

NAMED = ("file_name", "file_names")
"""The columns of the query's files, as ``Format.alternatives`` lists them."""
_FILE_NAME = re.compile(r"(?:(?P<part>.+)_)?file_names?")
_TARGETS = frozenset(("target", "output", "positive", "pos", "edited", "after", "document"))
_NEGATIVES = frozenset(("negative", "neg"))
_MEANINGS: dict[NamedSide, str] = {
    "query": "query image",
    "target": "target image",
    "negative": "image of a negative",
}


def named_side(column: str) -> NamedSide | None:
    """The side whose files a column names; ``None`` where it names none."""
    found = _FILE_NAME.fullmatch(column)
    if found is None:
        return None
    part = (found["part"] or "").lower()
    return "target" if part in _TARGETS else "negative" if part in _NEGATIVES else "query"


def named_column(column: str, *sides: NamedSide) -> Column | None:
    """What a column of file names becomes; ``None`` where it names no file of these sides, by default of any."""
    side = named_side(column)
    return None if side is None or (sides and side not in sides) else Column(column, _MEANINGS[side])


def first_or_named(
    record: RawRecord, columns: Sequence[str], context: RowContext, side: NamedSide = "query"
) -> tuple[ImageName, ...]:
    """The images of the first of ``columns`` that has any; else those that file names name. Raises as below."""
    found = (parse_images(record.get(column), column) for column in columns)
    return next(filter(None, found), ()) or named_images(record, context, side)


def named_images(record: RawRecord, context: RowContext, *sides: NamedSide) -> tuple[ImageName, ...]:
    """The images of these sides, in the order of the columns, as paths from the folder of the corpus.

    Raises:
        ItemError: ``bad_row`` where a column holds no name.
    """
    names = [name for name in record if named_side(name) in sides]
    found = (image for name in names for image in parse_images(record[name], name))
    return tuple(_placed(image, record, context.file) for image in found)


def _placed(image: ImageName, record: RawRecord, file: str) -> ImageName:
    if isinstance(image, bytes) or "://" in image or image.startswith(("/", "data:")):
        return image
    folder, name = posixpath.split(file)
    coco = re.fullmatch(r"captions_(\w+)\.json.*", name) if "image_id" in record else None
    if coco:
        folder = coco[1]
    return posixpath.normpath(posixpath.join(folder, image))
