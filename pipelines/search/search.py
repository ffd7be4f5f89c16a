"""``crem search``: the items nearest to a text, an image, or both.

A query is embedded by the model that made the index; one by another model is refused. How an index is searched:
``opened_index``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crem.errors import CheckpointError, ConfigError
from pipelines.search.opened_index import CANDIDATES, Hit, VectorIndex
from pipelines.tables.vector_types import prefix_of

if TYPE_CHECKING:
    import crem

__all__ = ["Query", "find", "model_of", "search"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """What is looked for, and how."""

    text: str | None = None
    images: tuple[Any, ...] = ()
    """As ``crem.Item`` takes them."""
    k: int = 10
    where: str | None = None
    """A condition on the columns, in SQL."""
    hybrid: bool = False
    """Whether the words of the text count as well."""
    rerank: bool = False
    """Whether MaxSim over the chorus states orders the best candidates."""

    def check(self) -> None:
        """Refuse a query that looks for nothing.

        Raises:
            ConfigError: with what to give.
        """
        if not self.text and not self.images:
            raise ConfigError('nothing to look for; give a text, such as "a red apple", or --image FILE')
        if self.hybrid and not self.text:
            raise ConfigError("--hybrid looks for words, and there is no text; give one, or leave --hybrid out")
        if self.k < 1:
            raise ConfigError(f"k={self.k} asks for no result; give 1 or more")


def model_of(index: VectorIndex, model: str | Path | crem.Crem) -> crem.Crem:
    """The loaded model for queries of an index.

    Raises:
        CheckpointError: another model made the index.
    """
    import crem

    loaded = crem.load(model, chorus_tokens=index.summary.chorus_tokens) if isinstance(model, str | Path) else model
    if loaded.fingerprint != index.fingerprint:
        raise CheckpointError(
            f"the index {index.folder.uri} was made by model {index.fingerprint} ({index.summary.model}), and this "
            f"model is {loaded.fingerprint}; search with that model, or embed and index again with this one"
        )
    return loaded


def search(index: str, model: str | Path | crem.Crem | None, query: Query) -> list[Hit]:
    """The items of ``index`` nearest to ``query``, embedded by ``model``.

    Args:
        index: folder or URI of an index.
        model: checkpoint folder or URI, by default the one that the index names; a loaded ``crem.Crem`` is taken as it
            is.

    Raises:
        ConfigError: there is no index, or it cannot be searched so.
        CheckpointError: another model made the index.
        ItemError: the query cannot be embedded.
    """
    query.check()
    opened = VectorIndex(index)
    if query.rerank:
        opened.require("states")  # before the model is loaded
    return find(opened, model_of(opened, model or opened.summary.model), query)


def find(opened: VectorIndex, model: crem.Crem, query: Query) -> list[Hit]:
    """``search`` in an index that is open, by the model that made it."""
    import crem
    from crem.data.sequence import CutCount

    query.check()
    sequence = model.prepare(crem.Item(text=query.text, images=query.images))
    if (sentence := CutCount.of([sequence]).sentence("queries", model.config.prompt.max_text_tokens)) is not None:
        log.warning("%s", sentence)
    encoded = model.encode_prepared([sequence], states=query.rerank)
    vector = prefix_of(encoded.vectors, opened.summary.dim)
    count = max(query.k, CANDIDATES) if query.rerank else query.k
    if query.hybrid and query.text:
        hits = opened.hybrid(vector[0], query.text, count, query.where)
    else:
        hits = opened.search(vector, count, query.where)[0]
    return hits if encoded.states is None else opened.rerank(hits, encoded.states[0], query.k)
