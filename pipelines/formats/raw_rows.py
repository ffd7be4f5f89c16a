"""From a raw record to a row that can be trained on, or to the reason why not. Pure functions, no I/O.

Absence is read leniently: a text or an image that is null, NaN or blank counts as absent, and so does a side or a
negative with neither text nor images. Types are not: a value of another type than its column's makes a ``bad_row``
(``cells``).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from crem.data.items import check_image_at
from crem.errors import ItemError
from pipelines.formats.cells import is_absent, is_blank, listed, parse_images, parse_text
from pipelines.formats.placeholders import place_images, remove_marks
from pipelines.sources.records import RawRecord

__all__ = [
    "COLUMNS",
    "NEGATIVE",
    "RawItem",
    "RawRow",
    "check_row",
    "negatives_of",
    "parse_row",
    "placed_item",
    "source_and_key",
]

COLUMNS = (
    "key",
    "source",
    "task",
    "split",
    "query_text",
    "query_images",
    "query_instruction",
    "target_text",
    "target_images",
    "target_instruction",
    "negatives",
    "question",
    "answer",
)

NEGATIVE = ("text", "images", "instruction")
"""What an object in ``negatives`` holds."""


@dataclass(frozen=True)
class RawItem:
    """One side of a row; images are names or inline bytes."""

    text: str | None
    images: tuple[str | bytes, ...]
    instruction: str | None
    image_at: tuple[int, ...] = ()
    """Of ``crem.data.items.Item``."""

    @property
    def is_empty(self) -> bool:
        return self.text is None and not self.images


@dataclass(frozen=True)
class RawRow:
    """A record whose types have been checked."""

    source: str
    key: str
    task: str
    split: str
    query: RawItem
    target: RawItem
    negatives: tuple[RawItem, ...]
    question: str | None
    answer: str | None


def source_and_key(record: RawRecord | None, *, key: str, source: str) -> tuple[str, str]:
    """(source, key) of any record, however bad: they identify a rejected row."""
    values = record or {}
    return _name_or(values.get("source"), source), _name_or(values.get("key"), key)


def parse_row(record: RawRecord, *, key: str, source: str, split: str = "train") -> RawRow:
    """Check the types of a record.

    Args:
        record: the columns of ``COLUMNS``, any of them absent.
        key: used where the record has none.
        source: used where the record has none, also as ``task``.
        split: of the record (``paths.split_of``).

    Raises:
        ItemError: ``bad_row`` or ``image_count``.
    """
    row_source = parse_text(record, "source") or source
    query = _side(record, "query_")
    return RawRow(
        source=row_source,
        key=parse_text(record, "key") or key,
        task=parse_text(record, "task") or row_source,
        split=split,
        query=query,
        target=_side(record, "target_"),
        negatives=tuple(n for n in _negatives(record.get("negatives")) if not n.is_empty),
        question=_question(record, query),
        answer=parse_text(record, "answer"),
    )


def check_row(row: RawRow, *, max_text_chars: int, max_images: int) -> None:
    """Refuse a row with nothing to learn from, or with more than the limits allow.

    Raises:
        ItemError: ``empty_item``, ``empty_query``, ``empty_target``, ``missing_answer``, ``missing_question``,
            ``text_too_long``, ``too_many_images`` or ``bad_image_at``.
    """
    turn = row.question is not None or row.answer is not None
    if row.query.is_empty and row.target.is_empty and not turn:
        raise ItemError("empty_item", "no text and no image on either side, and no question; fill the row or drop it")
    if row.query.is_empty:
        raise ItemError("empty_query", "query_text is blank and query_images is empty; give one of them")
    if row.answer is None and row.question is not None:
        raise ItemError(
            "missing_answer", f"question {row.question[:60]!r} has no answer; give one, or drop the question"
        )
    if row.question is None and row.answer is not None:
        raise ItemError("missing_question", f"answer {row.answer[:60]!r} has no question; give one, or drop the answer")
    if row.target.is_empty and not turn:
        raise ItemError("empty_target", "the row has a query, but neither a target nor a question; give one of them")
    for where, text in _texts(row):
        if text is not None and len(text) > max_text_chars:
            raise ItemError(
                "text_too_long",
                f"{where} has {len(text)} characters; the limit is {max_text_chars}; "
                "cut it or raise prepare.max_text_chars",
            )
    for where, item in _sides(row):
        check_image_at(item.image_at, images=len(item.images), text=item.text)
        if len(item.images) > max_images:
            raise ItemError(
                "too_many_images",
                f"{where} has {len(item.images)} images; the limit is {max_images}; "
                "drop some or raise model.image.max_images_per_item",
            )


def placed_item(
    text: str | None, images: tuple[str | bytes, ...], instruction: str | None, where: str, *, habit: bool = False
) -> RawItem:
    """An item whose image placeholders have become the places of its images (``placeholders``).

    Args:
        habit: whether the publisher writes placeholders into texts without an image; they are then removed.

    Raises:
        ItemError: ``image_count``.
    """
    if habit and not images:
        return RawItem(remove_marks(text, bare=False), (), remove_marks(instruction, bare=False))
    placed = place_images(text, images, where)
    return RawItem(placed.text, placed.images, remove_marks(instruction, bare=bool(images)), placed.image_at)


def _side(record: RawRecord, prefix: str) -> RawItem:
    """One side of our own rows. A text without images is left as it is, whatever marks it mentions."""
    text = parse_text(record, f"{prefix}text")
    images = parse_images(record.get(f"{prefix}images"), f"{prefix}images")
    instruction = parse_text(record, f"{prefix}instruction")
    if not images:
        return RawItem(text, (), instruction)
    return placed_item(text, images, instruction, f"{prefix}text")


def _question(record: RawRecord, query: RawItem) -> str | None:
    """The question, without its marks, which stand for the images of the query. Raises ``ItemError("image_count")``."""
    question = parse_text(record, "question")
    if not query.images:
        return question
    place_images(question, query.images, "question")
    return remove_marks(question)


def _negatives(value: Any) -> list[RawItem]:
    negatives = negatives_of(value)
    for number, negative in enumerate(negatives):
        filled = [name for name, cell in negative.items() if not is_blank(cell)]
        if filled and not any(name in NEGATIVE for name in filled):
            raise ItemError(
                "bad_row",
                f"negatives[{number}] is an object with {', '.join(map(repr, filled))[:200]}; "
                f"name what it holds {', '.join(NEGATIVE[:-1])} or {NEGATIVE[-1]}",
            )
    return [_side({f"negatives.{k}": v for k, v in negative.items()}, "negatives.") for negative in negatives]


def negatives_of(value: Any) -> list[dict[str, Any]]:
    """The objects of a cell of negatives. Raises ``ItemError("bad_row")``."""
    value = listed(value)
    if is_absent(value):
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(v, dict) for v in value):
        raise ItemError("bad_row", f"negatives is {repr(value)[:60]}; it must be a list of {{text, images}}")
    return list(value)


def _sides(row: RawRow) -> list[tuple[str, RawItem]]:
    return [("query", row.query), ("target", row.target), *(("negative", n) for n in row.negatives)]


def _texts(row: RawRow) -> list[tuple[str, str | None]]:
    of_sides = [
        (f"{name}_{kind}", getattr(side, kind)) for name, side in _sides(row) for kind in ("text", "instruction")
    ]
    return [*of_sides, ("question", row.question), ("answer", row.answer), ("key", row.key), ("source", row.source)]


def _name_or(value: Any, default: str) -> str:
    text = str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    text = unicodedata.normalize("NFC", text.encode(errors="replace").decode())[:1000]
    return text if text.strip() else default
