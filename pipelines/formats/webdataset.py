"""WebDataset: the members of a tar that share a key are a record, named by their suffixes.

Source: the documentation of ``webdataset`` and of img2dataset. Images are all members with the suffix of an image, in
the order of their names (``0.jpg``, ``1.jpg``, ``10.jpg``). The text is ``txt``, the class ``cls``. What ``json`` holds
is read as a row of its own format (conversations, captions, questions and answers …) about these images; its columns
are called ``json.caption`` and so on. A text in it is a caption, a list is turns or captions. Of several such members
(``json``, ``meta.json``) the columns are put together. img2dataset's ``url`` there is where an image came from, and is
not read again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from crem.errors import ItemError
from pipelines.formats.cells import is_absent, is_blank, parse_images
from pipelines.formats.chat_messages import ChatMessages
from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.llava import Llava
from pipelines.formats.paths import split_in
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

_CAPTIONS_IN_LISTS = frozenset(("caption", "text", "raw"))


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

    def preferred(self, name: str, names: Sequence[str]) -> str | None:
        """Images of the tar go before those that its JSON names."""
        members = [other for other in names if not other.startswith("json.") and other.rpartition(".")[2] in _IMAGES]
        if members and name.startswith("json.") and name.removeprefix("json.").lower() in _IMAGE_NAMES:
            return members[0]
        return super().preferred(name, names)

    def names(self, record: RawRecord) -> Sequence[str]:
        try:
            inner = _json_of(record)
        except ItemError:
            return tuple(record)  # the row is rejected where it is read
        return (*record, *(f"json.{name}" for name in inner if name != _LISTED))

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return "__key__" in columns

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        inner, values = _opened(record)
        return inner.rows(values, replace(context, split=split_in(values) or context.split))

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
        if _LISTED in values:  # captions without a name: a text beside them is one more
            texts = [record[name] for name in _TEXTS if not is_absent(record.get(name))][:1]
            texts += values.pop(_LISTED)
            if isinstance(values.get("caption"), str):
                texts.append(values["caption"])
            values["caption"] = list(dict.fromkeys(texts))
        else:
            _take(record, _TEXTS, values, "caption")
        _take(record, _CLASSES, values, "label")
    return known, values


def _take(record: RawRecord, members: Sequence[str], values: RawRecord, column: str) -> None:
    """Let a member of the tar go before what ``json`` says."""
    for name in members:
        if not is_absent(record.get(name)):
            values[column] = record[name]
            return


_LISTED = "\0captions"
"""Where captions stand that have no name, of a member that is a text or a list of texts. No column is called so."""


def _json_of(record: RawRecord) -> RawRecord:
    """What the JSON members hold by column; ``json`` goes before others such as ``meta.json``.

    Raises:
        ItemError: ``bad_row`` for a number, or a list of anything but turns, captions or texts.
    """
    members = [name for name in record if name.rpartition(".")[2].lower() in _JSON and not is_blank(record[name])]
    values: RawRecord = {}
    for name in sorted(members, key=lambda name: (name not in _JSON, name)):
        values = {**_columns_of(record[name], name), **values}
    return values


def _columns_of(value: Any, name: str) -> RawRecord:
    cells = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        return dict(value)
    if all(isinstance(cell, str) for cell in cells):
        return {_LISTED: [cell for cell in cells if not is_absent(cell)]}
    if all(isinstance(cell, dict) for cell in cells):
        keys = set().union(*cells)
        if keys >= {"from", "value"}:
            return {"conversations": value}
        if keys >= {"role", "content"}:
            return {"messages": value}
        if keys & _CAPTIONS_IN_LISTS:
            return {"captions": value}
    raise ItemError(
        "bad_row",
        f"{name} is {repr(value)[:60]}; it must be an object, a text, or a list of texts, of turns (from, value or "
        "role, content) or of captions (caption, text or raw)",
    )


def _image_members(record: RawRecord) -> list[str]:
    """Names of the images, ``2.jpg`` before ``10.jpg``, whatever their order in the tar."""
    names = [name for name in record if name.rpartition(".")[2].lower() in _IMAGES]
    return sorted(
        names,
        key=lambda name: [(len(part), part) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)],
    )
