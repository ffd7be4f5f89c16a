"""LLaVA and ShareGPT-4V: conversations about an image, several, or none.

Sources: the data of LLaVA (``llava_v1_5_mix665k.json``), ShareGPT-4V and their many descendants: ``conversations`` of
``{"from": "human" | "gpt", "value"}`` and ``image``, a path or a list. ``<image>`` marks the place. The ``id`` is not
used as the key: LLaVA's repeat over the sub-datasets from which they come, and rows would be taken for duplicates.
"""

from __future__ import annotations

from collections.abc import Sequence

from crem.errors import ItemError
from pipelines.formats.cells import parse_text
from pipelines.formats.conversation import (
    Turn,
    conversation_item,
    conversation_rows,
    read_turns,
    refuse_other_media,
)
from pipelines.formats.file_names import NAMED, first_or_named, named_column
from pipelines.formats.format import Column, Format, RowContext
from pipelines.formats.placeholders import ImageName
from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.sources.records import RawRecord

__all__ = ["Llava"]

_IMAGES = ("image", "images", "image_path")
"""Columns of images. Where all are empty, the files that ``file_name`` names are: conversations in an image folder."""


class Llava(Format):
    """Conversations as LLaVA writes them."""

    name = "llava"
    title = "conversations of LLaVA, ShareGPT or ShareGPT-4V"
    columns = (
        Column("conversations", "questions and answers"),
        *(Column(name, "query images") for name in _IMAGES),
        Column("system", "what precedes the first question"),
        Column("video", "a row with one is rejected"),
        Column("videos", "a row with one is rejected"),
        Column("audio", "a row with one is rejected"),
        *(Column(name, "not unique in published sets", used=False) for name in ("id", "idx", "image_id", "uid")),
        *(Column(name, "where it comes from", used=False) for name in ("model", "source", "dataset", "data_source")),
        *(Column(name, "size of the image", used=False) for name in ("width", "height", "width_list", "height_list")),
    )
    alternatives = ((*_IMAGES, *NAMED),)
    pairs = False

    def column(self, name: str) -> Column | None:
        return super().column(name) or named_column(name, "query")

    def matches(self, columns: frozenset[str], records: Sequence[RawRecord]) -> bool:
        return "conversations" in columns

    def rows(self, record: RawRecord, context: RowContext) -> list[RawRow]:
        return conversation_rows(*_conversation(record, context), context)

    def item(self, record: RawRecord, context: RowContext) -> RawItem:
        return conversation_item(*_conversation(record, context), context)


def _conversation(record: RawRecord, context: RowContext) -> tuple[list[Turn], tuple[ImageName, ...]]:
    refuse_other_media(record, ("video", "videos", "audio"))
    images = first_or_named(record, _IMAGES, context)
    if record.get("conversations") is None:
        raise ItemError("bad_row", "conversations is absent; a row of LLaVA has a list of turns there")
    turns, found = read_turns(record["conversations"], "conversations", images)
    system = parse_text(record, "system")
    return ([Turn("system", system), *turns] if system else turns), found
