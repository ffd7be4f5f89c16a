"""WebDataset: the members of a tar that share a key are a record, named by their suffixes.

Source: the documentation of ``webdataset`` and of img2dataset. Images are all members with the suffix of an image, in
the order of their names (``0.jpg``, ``1.jpg``, ``10.jpg``). The text is ``txt``, the class ``cls``. What ``json`` holds
is read as a row of its own format (conversations, captions, questions and answers …) about these images; its columns
are called ``json.caption`` and so on. img2dataset's ``url`` there is where an image came from, and is not read again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipelines.formats.cells import is_absent, parse_images
from pipelines.formats.chat_messages import ChatMessages
from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.llava import Llava
from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.formats.table import IMAGES, ImageTable, lower_case
from pipelines.sources.records import RawRecord

__all__ = ["WebDataset"]

_IMAGES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "avif", "img"))
_TEXTS = ("txt", "text", "caption")
_CLASSES = ("cls", "class")
_JSON = ("json", "jsn")
_INNER: tuple[Format, ...] = (Llava(), ChatMessages(), ImageTable())
_IMAGE_NAMES = frozenset((*IMAGES, "image", "images", "file_name"))


class WebDataset(Format):
    """Records of tar files."""

    name = "webdataset"
    title = "a WebDataset"
    columns = (
        Column("__key__", "name of the record", used=False),
        *(Column(name, "image") for name in sorted(_IMAGES)),
        *(Column(name, "caption") for name in _TEXTS),
        *(Column(name, "label") for name in _CLASSES),
        Column("json", "a row about the images"),
        *(Column(f"json.{c.name}", c.meaning, c.used) for inner in _INNER for c in inner.columns),
    )
    pairs = False

    def column(self, name: str) -> Column | None:
        if name.startswith("json."):
            inner = name.removeprefix("json.")
            return next((column for known in _INNER if (column := known.column(inner)) is not None), None)
        kind = name.rpartition(".")[2]
        if kind in _IMAGES:
            return Column(name, "image")
        if kind in _JSON:
            return Column(name, "a row about the images")
        return super().column(name)

    def names(self, record: RawRecord) -> Sequence[str]:
        inner = _json_of(record)
        return (*record, *(f"json.{name}" for name in inner if isinstance(name, str)))

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return "__key__" in columns

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        inner, values = _opened(record)
        return inner.rows(values, context)

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        inner, values = _opened(record)
        return inner.item(values, context)


def _opened(record: RawRecord) -> tuple[Format, RawRecord]:
    """The record as one of an inner format, with the images of the tar in ``images``."""
    images = tuple(image for name in _image_members(record) for image in parse_images(record[name], name))
    values = _json_of(record)
    if images:
        values = {name: value for name, value in values.items() if name.lower() not in _IMAGE_NAMES}
        values["images"] = list(images)
    known = next((known for known in _INNER[:-1] if known.matches(frozenset(values), [values])), _INNER[-1])
    if known is _INNER[-1]:
        values = lower_case(values)
        _take(record, _TEXTS, values, "caption")
        _take(record, _CLASSES, values, "label")
    return known, values


def _take(record: RawRecord, members: Sequence[str], values: RawRecord, column: str) -> None:
    """Let a member of the tar go before what ``json`` says."""
    for name in members:
        if not is_absent(record.get(name)):
            values[column] = record[name]
            return


def _json_of(record: RawRecord) -> RawRecord:
    value: Any = next((record[name] for name in _JSON if isinstance(record.get(name), dict)), {})
    return dict(value)


def _image_members(record: RawRecord) -> list[str]:
    """Names of the images, ``2.jpg`` before ``10.jpg``, whatever their order in the tar."""
    names = [name for name in record if name.rpartition(".")[2].lower() in _IMAGES]
    return sorted(
        names,
        key=lambda name: [(len(part), part) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)],
    )
