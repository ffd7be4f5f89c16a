"""``crem answer``: find items, then answer about each from its stored chorus memory alone.

Neither the item nor its picture is read: a memory has the keys and values of the item's chorus tokens, which is all
that compressed generation reads (``crem.model.memory``). So a corpus is embedded once, and asked later without it.

An answer is of one item. Memories of several items are not joined, because the model was trained on one item at a
time; so there are as many answers as sources, each with its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crem.errors import ConfigError
from crem.model.memory import ChorusMemory, MemoryLayout
from pipelines.search.opened_index import Hit, VectorIndex
from pipelines.search.search import Query, find, model_of

if TYPE_CHECKING:
    import crem
    from crem.model.answers import Answer

__all__ = ["SourcedAnswer", "answers", "memories_of_hits"]


@dataclass(frozen=True)
class SourcedAnswer:
    """A source, and the answer that comes from its memory."""

    hit: Hit
    pieces: Iterator[str | Answer]
    """A piece of text for every decoded token, and last the ``Answer``; the model runs as they are taken."""


def answers(
    index: str, model: str | Path | crem.Crem | None, question: str, query: Query, *, max_new_tokens: int = 64
) -> Iterator[SourcedAnswer]:
    """Answers about the items of ``index`` nearest to ``query``, the nearest first.

    Args:
        index: folder or URI of an index with memories.
        model: as of ``search``.
        query: finds the sources; ``query.k`` is how many.
        max_new_tokens: most tokens of an answer.

    Raises:
        ConfigError: no question, no room for an answer, no index, an index without memories, or one that cannot be
            searched so.
        CheckpointError: another model made the index.
        ItemError: the query cannot be embedded.
    """
    if not question.strip():
        raise ConfigError('there is no question; give one, as in crem answer "What is it?" --image photo.png')
    if max_new_tokens < 1:
        raise ConfigError(f"--max-tokens {max_new_tokens} leaves no room for an answer; give 1 or more")
    query.check()
    opened = VectorIndex(index)
    opened.require("memory")
    if query.rerank:
        opened.require("states")
    loaded = model_of(opened, model or opened.summary.model)
    hits = find(opened, loaded, query)
    for hit, memory in zip(hits, memories_of_hits(opened, hits), strict=True):
        yield SourcedAnswer(hit, loaded.stream_memory(memory, question, max_new_tokens=max_new_tokens))


def memories_of_hits(opened: VectorIndex, hits: list[Hit]) -> list[ChorusMemory]:
    """The stored memories of hits, in their order.

    Raises:
        ConfigError: the index has no memories, or is damaged.
    """
    layout = MemoryLayout.of(opened.schema.metadata)
    return [ChorusMemory.from_bytes(layout, stored) for stored in opened.column([hit.row for hit in hits], "memory")]
