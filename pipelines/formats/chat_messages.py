"""Messages in the shape of OpenAI's chat: conversations, and ms-swift's data for embedding models.

Sources: OpenAI's API reference (``role``, ``content`` as a text or as parts) and ms-swift's guides "Custom Dataset" and
"Embedding Training". There ``messages`` is the anchor and ``positive_messages`` and ``negative_messages`` are lists of
messages of the same kind, each with its own list of images, one for each ``<image>``. A system message is the
embedding instruction of its side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from crem.errors import ItemError
from pipelines.formats.cells import is_absent, is_blank, listed, parse_images
from pipelines.formats.conversation import (
    conversation_item,
    conversation_rows,
    read_turns,
    refuse_other_media,
)
from pipelines.formats.file_names import NAMED, first_or_named, named_column, named_images
from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.placeholders import ImageName
from pipelines.formats.raw_rows import RawItem, RawRow, placed_item
from pipelines.sources.records import RawRecord

__all__ = ["ChatMessages", "SwiftPairs"]

_IMAGES = ("images", "image")
_OTHER_MEDIA = (
    *("videos", "audios", "positive_videos", "positive_audios", "negative_videos", "negative_audios"),
    *("video", "audio"),
)
_SHARED = (
    Column("messages", "questions and answers; the query, where there are positives"),
    *(Column(name, "query images") for name in _IMAGES),
    *(Column(name, "a row with one is rejected") for name in _OTHER_MEDIA),
    *(Column(name, "of agents and grounding", used=False) for name in ("tools", "objects", "channel", "solution")),
    *(Column(name, "not the key", used=False) for name in ("id", "uuid")),
    *(Column(name, "of preference training", used=False) for name in ("rejected_response", "rejected_messages")),
    Column("rejected_images", "of preference training", used=False),
)
_MIN_LABEL = 0.5
"""Similarity from which ms-swift's ``label`` means a pair: its labels are 0 or 1, or a cosine."""
_TRUTH = {"false": "0", "true": "1"}
"""Labels as tables of text have them, beside ``"0"`` and ``"1.0"``."""


class ChatMessages(Format):
    """Conversations as OpenAI's API and ms-swift write them."""

    name = "messages"
    title = "chat messages (OpenAI, ms-swift)"
    columns = (*_SHARED, Column("label", "of preference training", used=False))
    alternatives = ((*_IMAGES, *NAMED),)
    pairs = False

    def column(self, name: str) -> Column | None:
        return super().column(name) or named_column(name, "query")

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return "messages" in columns and not _has_pairs(columns)

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        refuse_other_media(record, _OTHER_MEDIA)
        return conversation_rows(*read_turns(record.get("messages"), "messages", _images(record, context)), context)

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        refuse_other_media(record, _OTHER_MEDIA)
        return conversation_item(*read_turns(record.get("messages"), "messages", _images(record, context)), context)


class SwiftPairs(Format):
    """An anchor with a positive and negatives, as ms-swift writes them for embedding models."""

    name = "ms-swift"
    title = "anchors, positives and negatives of ms-swift"
    columns = (
        *_SHARED,
        Column("positive_messages", "target"),
        Column("positive_images", "target images"),
        Column("negative_messages", "negatives"),
        Column("negative_images", "images of the negatives"),
        Column("label", f"a row below {_MIN_LABEL} is no pair and is rejected"),
    )
    alternatives = ((*_IMAGES, *NAMED),)
    pairs = True

    def column(self, name: str) -> Column | None:
        return super().column(name) or named_column(name)

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return "messages" in columns and _has_pairs(columns)

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        refuse_other_media(record, _OTHER_MEDIA)
        _check_label(record.get("label"))
        query = _side(record.get("messages"), _images(record, context), "messages")
        positives = _sides(record, "positive", context) or [RawItem(None, (), None)]
        negatives = tuple(item for item in _sides(record, "negative", context) if not item.is_empty)
        return [
            RawRow(
                source=context.source,
                key=context.key if len(positives) == 1 else f"{context.key}/{number + 1}",
                task=context.source,
                split=context.split,
                query=query,
                target=positive,
                negatives=negatives,
                question=None,
                answer=None,
            )
            for number, positive in enumerate(positives)
        ]

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        row = self.rows(record, context)[0]
        return row.target if context.side == "target" else row.query


def _has_pairs(columns: frozenset[str]) -> bool:
    return not columns.isdisjoint({"positive_messages", "negative_messages"})


def _images(record: RawRecord, context: RowContext) -> tuple[ImageName, ...]:
    return first_or_named(record, _IMAGES, context)


def _check_label(label: Any) -> None:
    if is_absent(label):
        return
    text = str(label).strip().lower()
    try:
        value = float(_TRUTH.get(text, text))
    except ValueError:
        raise ItemError("bad_row", f"label is {repr(label)[:60]}; give a number from 0 to 1") from None
    if not value >= _MIN_LABEL:
        raise ItemError(
            "not_a_pair", f"label is {label}: anchor and positive are not alike; below {_MIN_LABEL} a row is no pair"
        )


def _side(messages: Any, images: tuple[ImageName, ...], where: str) -> RawItem:
    """One side: what all its turns say; a system message is its instruction."""
    turns, images = read_turns(messages, where, images)
    instruction = "\n".join(turn.text for turn in turns if turn.role == "system")
    text = "\n".join(turn.text for turn in turns if turn.role != "system")
    return placed_item((text.strip() and text) or None, images, instruction.strip() or None, where)


def _sides(record: RawRecord, name: Literal["positive", "negative"], context: RowContext) -> list[RawItem]:
    """The positives or negatives: lists of messages with lists of images, or one of each without the outer list."""
    sides, images = record.get(f"{name}_messages"), record.get(f"{name}_images")
    if is_blank(listed(images)):
        images = list(named_images(record, context, "target" if name == "positive" else "negative"))
    if is_blank(listed(sides)):
        return []
    if not isinstance(sides, list | tuple):
        raise ItemError("bad_row", f"{name}_messages is {repr(sides)[:60]}; it must be a list of lists of messages")
    if sides and isinstance(sides[0], dict):
        sides = [sides]
    groups = [] if is_absent(images) else list(images) if isinstance(images, list | tuple) else [images]
    if not all(group is None or isinstance(group, list | tuple) for group in groups):
        groups = [groups] if len(sides) == 1 else [[image] for image in groups]
    if groups and len(groups) != len(sides):
        raise ItemError(
            "image_count", f"{name}_images has {len(groups)} lists for {len(sides)} {name}_messages; give one for each"
        )
    groups = groups or [()] * len(sides)
    return [
        RawItem(None, (), None)
        if is_blank((messages, group))
        else _side(messages, parse_images(group, f"{name}_images[{i}]"), f"{name}_messages[{i}]")
        for i, (messages, group) in enumerate(zip(sides, groups, strict=True))
    ]
