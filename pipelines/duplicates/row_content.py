"""What makes two rows the same row: the content of their query and target sides, question and answer.

Two rows are exact duplicates if all of it is equal, and near duplicates if every text and every image of one is near to
its counterpart in the other, in the same order. A picture in many rows of different texts, or a class name that is the
target of many pictures, therefore makes no duplicates. Negatives do not count: they are found, not given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from pipelines.duplicates.text_signature import normal_form, text_id
from pipelines.tables.schema import ArrowRow

__all__ = ["COLUMNS", "evidence_texts", "exact_key", "images_of", "near_key", "texts_of"]

COLUMNS = ["id", "source", "key", "split", "query", "target", "question", "answer"]
_SIDES = ("query", "target")


def sides(row: ArrowRow) -> Iterator[ArrowRow]:
    """The sides that the row has."""
    yield from (row[side] for side in _SIDES if row[side] is not None)


def texts_of(row: ArrowRow) -> Iterator[str]:
    """Every text of the row but instructions and negatives."""
    texts = [*(side["text"] for side in sides(row)), row["question"], row["answer"]]
    yield from (text for text in texts if text)


def images_of(row: ArrowRow) -> Iterator[int]:
    """Ids of the images of the row but for its negatives."""
    yield from (image for side in sides(row) for image in side["images"] or ())


def evidence_texts(row: ArrowRow, min_chars: int) -> Iterator[str]:
    """Normal forms of the texts that show by themselves where a row is from.

    These are the sides without an image, from a length on: "yes", a class name or an instruction beside an image are
    in every corpus.
    """
    for side in sides(row):
        if side["text"] and not side["images"]:
            normal = normal_form(side["text"])
            if len(normal) >= min_chars:
                yield normal


def exact_key(row: ArrowRow) -> bytes:
    """Equal for rows of equal content."""
    return _digest(
        [
            (row[side]["text"], row[side]["instruction"], row[side]["images"] or [], row[side]["image_at"] or [])
            if row[side] is not None
            else None
            for side in _SIDES
        ],
        row["question"],
        row["answer"],
    )


def near_key(row: ArrowRow, text: Callable[[int], int], image: Callable[[int], int]) -> bytes:
    """Equal for rows of near-equal content.

    Args:
        row: of ``schema.ROWS``.
        text: the representative of the texts that are near to the one with an id (of ``text_id``).
        image: the representative of the images that are near to the one with an id.
    """

    def representative(value: str | None) -> int | None:
        return text(text_id(normal_form(value))) if value else None

    return _digest(
        [
            (
                representative(row[side]["text"]),
                normal_form(row[side]["instruction"]),
                [image(i) for i in row[side]["images"] or ()],
            )
            if row[side] is not None
            else None
            for side in _SIDES
        ],
        representative(row["question"]),
        representative(row["answer"]),
    )


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16).digest()
