"""Tables of images with a caption, a label, or a question and its answer, under the names that many use.

Case does not count (LAION writes ``URL`` and ``TEXT``). Image, caption and label of a row make a retrieval pair, the
image being the query; a question and its answer make a generation turn about the image. Of several columns that could
be the image or the caption, the first in the order below that is not empty is taken.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence
from typing import Any

from crem.errors import ItemError
from pipelines.formats.cells import is_absent, parse_images, parse_text_value
from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.placeholders import remove_marks
from pipelines.formats.raw_rows import RawItem, RawRow, placed_item
from pipelines.sources.records import RawRecord

__all__ = ["ImageTable", "TextTable", "caption_item", "caption_rows", "first_images", "lower_case"]

IMAGES = (
    *("images", "image", "img", "imgs", "picture", "pictures", "photo", "photos"),
    *("bytes", "image_bytes", "img_bytes", "image_data", "jpg", "jpeg", "png", "webp"),
    *("image_path", "image_paths", "img_path", "image_file", "image_filename", "image_name", "filepath", "file_path"),
    *("filename", "path", "file"),
    *("image_url", "image_urls", "img_url", "image_uri", "url", "uri"),
)
"""Columns of images, in the order in which they are preferred: bytes before names before addresses."""
CAPTIONS = (
    *("caption", "captions", "text", "txt", "title", "alt", "alt_text", "description", "sentence", "sentences"),
    *("raw", "prompt", "sentences_raw"),
)
LABELS = ("label", "labels", "class", "class_name", "category", "fine_label", "label_name", "cls")
QUESTIONS = ("question", "query")
ANSWERS = ("answer", "multiple_choice_answer", "answers", "response")
NAMES = ("split", "task", "source", "instruction", "id")
IGNORED = {
    "size or form of the image": (
        *("width", "height", "original_width", "original_height", "exif", "mode", "format", "aspect_ratio"),
        *("image_width", "image_height", "size", "file_size"),
    ),
    "scores": ("similarity", "punsafe", "pwatermark", "nsfw", "aesthetic", "aesthetic_score", "watermark", "unsafe"),
    "hashes": ("hash", "sha256", "md5", "phash", "dhash", "uid"),
    "state of a download": ("status", "error_message", "error", "shard_id"),
    "numbers and provenance, which are not unique in published sets": (
        *(
            "key",
            "sample_id",
            "image_id",
            "img_id",
            "imgid",
            "caption_id",
            "question_id",
            "sentids",
            "cocoid",
            "filesize",
        ),
        *("license", "licence", "language", "lang", "coco_url", "flickr_url", "date_captured", "__index_level_0__"),
        *("unnamed: 0", "index", "idx"),
    ),
}


def _columns() -> tuple[Column, ...]:
    kinds = {"image": IMAGES, "caption": CAPTIONS, "label": LABELS, "question": QUESTIONS, "answer": ANSWERS}
    used = [Column(name, meaning) for meaning, names in kinds.items() for name in names]
    used += [Column(name, name) for name in NAMES]
    return (*used, *(Column(name, why, used=False) for why, names in IGNORED.items() for name in names))


_BY_NAME = {column.name: column for column in _columns()}
_WITHOUT_IMAGE = frozenset((*CAPTIONS, *LABELS, *QUESTIONS, *ANSWERS))


class ImageTable(Format):
    """A table with a column of images."""

    name = "table"
    title = "a table of images with captions, labels, or questions and answers"
    columns = _columns()
    alternatives = (IMAGES, (*CAPTIONS, *LABELS), QUESTIONS, ANSWERS)
    pairs = False

    def column(self, name: str) -> Column | None:
        return _BY_NAME.get(name.lower())

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return not {c.lower() for c in columns}.isdisjoint(IMAGES)

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        values = lower_case(record)
        return caption_rows(values, first_images(values, IMAGES), context)

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        values = lower_case(record)
        return caption_item(values, _item_images(values), context)


class TextTable(ImageTable):
    """A table of texts without an image: items to embed. There is no pair in it."""

    name = "texts"
    title = "a table of texts"

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return not {c.lower() for c in columns}.isdisjoint(CAPTIONS)

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        raise ItemError("empty_target", "a text alone is no pair; give query_text and target_text, or images")


def lower_case(record: RawRecord) -> RawRecord:
    """The record by lower-case names; of two columns that then have one name, the first that is not absent."""
    values: RawRecord = {}
    for name, value in record.items():
        if is_absent(values.get(name.lower())):
            values[name.lower()] = value
    folder, file = values.get("filepath"), values.get("filename")
    if isinstance(folder, str) and isinstance(file, str) and not folder.endswith(file):  # Karpathy's split of COCO
        values["filepath"] = posixpath.join(folder, file)
    return values


def first_images(values: RawRecord, columns: Sequence[str]) -> tuple[str | bytes, ...]:
    """The images of the first column that has any. Raises ``ItemError("bad_row")``."""
    for column in columns:
        if not is_absent(values.get(column)) and (images := parse_images(values[column], column)):
            return images
    return ()


def _item_images(values: RawRecord) -> tuple[str | bytes, ...]:
    """As ``first_images``; ``uri`` beside a text is only the name of the item, unless it ends like an image."""
    images = first_images(values, [c for c in IMAGES if c != "uri"])
    if images or is_absent(values.get("uri")):
        return images
    uri = parse_images(values["uri"], "uri")
    named = uri and isinstance(uri[0], str) and uri[0].lower().endswith(_SUFFIXES)
    return uri if named or not any(_texts(values, CAPTIONS)) else ()


_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".heic")


def caption_rows(values: RawRecord, images: tuple[str | bytes, ...], context: RowContext) -> list[RawRow]:
    """The rows of an image with its captions (one row each), its label, or a question and answer.

    Raises:
        ItemError: ``bad_row``, ``empty_query`` where there is no image, or ``image_count``.
    """
    if not images:
        raise ItemError("empty_query", "no column of the row holds an image; fill one or drop the row")
    captions: list[str | None] = [*_texts(values, CAPTIONS)]
    captions = captions or [_label(values)]
    question = next(iter(_texts(values, QUESTIONS)), None)
    answer = _answer(values)
    rows = []
    for number, caption in enumerate(captions):
        rows.append(
            RawRow(
                source=parse_text_value(values.get("source"), "source") or context.source,
                key=context.key if len(captions) == 1 else f"{context.key}/{number + 1}",
                task=parse_text_value(values.get("task"), "task") or context.source,
                split=context.split,
                query=RawItem(None, images, None),
                target=RawItem(_without_marks(caption, images, "caption"), (), None),
                negatives=(),
                question=_without_marks(question, images, "question"),
                answer=answer,
            )
        )
        question = answer = None  # one generation turn, with the first caption
    return rows


def _without_marks(text: str | None, images: tuple[str | bytes, ...], where: str) -> str | None:
    """A text about images that the other side holds; its marks must be as many. Raises ``ItemError("image_count")``."""
    placed_item(text, images, None, where)
    return remove_marks(text)


def caption_item(values: RawRecord, images: tuple[str | bytes, ...], context: RowContext) -> RawItem:
    """An image with its text as one item, or the side of it that is asked for."""
    texts = _texts(values, CAPTIONS) or _texts(values, QUESTIONS)
    text = "\n".join(texts) or _label(values)
    instruction = parse_text_value(values.get("instruction"), "instruction")
    if not images:
        item = RawItem(text, (), instruction)
        return RawItem(None, (), instruction) if context.side == "query" else item
    item = placed_item(text, images, instruction, "text")
    if context.side == "query":
        return RawItem(None, item.images, instruction)
    if context.side == "target":
        return RawItem(remove_marks(text), (), instruction)
    return item


def _texts(values: RawRecord, columns: Sequence[str]) -> list[str]:
    """The texts of the first column that has any."""
    for column in columns:
        value = values.get(column)
        cells = value if isinstance(value, list | tuple) else [value]
        cells = [c.get("raw", c.get("text", c.get("caption"))) if isinstance(c, dict) else c for c in cells]
        texts = [text for cell in cells if (text := parse_text_value(cell, column)) is not None]
        if texts:
            return texts
    return []


def _label(values: RawRecord) -> str | None:
    """The name of the class, or its number where the schema has no names. Of several, each."""
    names = []
    for column in LABELS:
        value = values.get(column)
        for cell in value if isinstance(value, list | tuple) else [value]:
            if (text := parse_text_value(cell, column)) is not None:
                names.append(text)
        if names:
            return ", ".join(names)
    return None


def _answer(values: RawRecord) -> str | None:
    """The answer; of several people's answers the one given most often."""
    for column in ANSWERS:
        value: Any = values.get(column)
        cells = value if isinstance(value, list | tuple) else [value]
        cells = [c.get("answer", c.get("text")) if isinstance(c, dict) else c for c in cells]
        texts = [text for cell in cells if (text := parse_text_value(cell, column)) is not None]
        if texts:
            return Counter(texts).most_common(1)[0][0]
    return None
