"""An index opened for search, at the version that was complete then: by vectors, by words, and a second look.

A query compares vectors of unit length by their inner product, the cosine. Three things may be added to it: a filter on
the columns, which is applied before the search (so that k rows are found if there are k); the ranks of a full-text
search (hybrid); and a second look at the best candidates by their chorus states (``late_interaction``). Rows stay on
storage: a search reads what it visits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crem.errors import ConfigError
from pipelines.search.index_dataset import PART_COLUMN, IndexSummary, open_dataset
from pipelines.search.late_interaction import max_sim
from pipelines.search.recall import vectors_of
from pipelines.tables.schema import ArrowRow
from pipelines.tables.storage import Folder

__all__ = ["CANDIDATES", "Hit", "VectorIndex"]

_LARGE = ("embedding", "states", "memory", PART_COLUMN)
"""Columns that a hit does not show."""
CANDIDATES = 100
"""Rows of each of the two searches of a hybrid one, and rows that are re-ranked; more where k is more. Source: ours."""
_Stored: TypeAlias = Literal["states", "memory"]
_WRITTEN_BY: dict[_Stored, tuple[str, str]] = {
    "states": ("chorus states, which re-ranking compares", "embed.states=true"),
    "memory": ("chorus memories, from which answers come", "embed.memory=bf16"),
}
"""What a column has, and the setting that makes ``crem embed`` write it."""


@dataclass(frozen=True)
class Hit:
    """One result, best first."""

    id: Any
    """As the items have it."""
    score: float
    """The cosine; of a hybrid search the sum of 1 / (60 + rank) over its two searches, and after re-ranking MaxSim."""
    uri: str | None
    text: str | None
    columns: ArrowRow = field(default_factory=dict)
    """Those of ``embed.keep``."""
    row: int = -1
    """Address in the dataset."""


class VectorIndex:
    """An index opened for search, at the version that was complete when it was opened.

    Raises:
        ConfigError: there is no complete index, or it is damaged.
    """

    def __init__(self, place: str):
        folder = Folder.at(place)
        summary = IndexSummary.read(folder)
        if summary is None:
            raise ConfigError(
                f"{place!r} is not an index (no {IndexSummary.FILE}, or one of an older crem); run crem index into it "
                "first"
            )
        self.summary, self.folder, self._place = summary, folder, place
        with self._damage_explained():
            self._dataset = open_dataset(folder, summary.version)
            if (rows := self._dataset.count_rows()) != summary.count:
                raise ValueError(f"{IndexSummary.FILE} says {summary.count} vectors, and there are {rows}")
        self._shown = [name for name in self._dataset.schema.names if name not in _LARGE]

    @property
    def fingerprint(self) -> str:
        """Of the model that made the vectors."""
        return self.summary.fingerprint

    @property
    def schema(self) -> pa.Schema:
        """Of the dataset; its metadata has the stamps of ``crem embed``."""
        return self._dataset.schema

    def search(self, vectors: NDArray[np.float32], k: int, where: str | None = None) -> list[list[Hit]]:
        """The ``k`` best hits of each of the query vectors [N, dim], fewer if the index holds fewer.

        Args:
            where: a condition on the columns, in SQL; hits meet it.

        Raises:
            ConfigError: ``k`` or ``where`` cannot be used, or the index is damaged.
        """
        if k < 1:
            raise ConfigError(f"k={k} asks for no result; give 1 or more")
        return [self._hits(self._nearest(vector, k, where), "_distance") for vector in vectors]

    def hybrid(self, vector: NDArray[np.float32], words: str, k: int, where: str | None = None) -> list[Hit]:
        """The ``k`` best by the ranks of two searches: by the vector, and for the words in the texts.

        Raises:
            ConfigError: the index has no full-text index, or as in ``search``.
        """
        from lancedb.rerankers import RRFReranker  # three seconds of imports

        if not self.summary.full_text:
            raise ConfigError(
                f"the index {self._place!r} has no index of words; run crem index into it with index.full_text=true"
            )
        most = max(k, CANDIDATES)
        by_vector = self._nearest(vector, most, where)
        with self._damage_explained(where):
            by_words = self._dataset.scanner(
                columns=[*self._shown, "_score"],
                full_text_query={"columns": ["text"], "query": words},
                limit=most,
                **self._filter(where),
            ).to_table()
        if not by_words.num_rows:
            return self._hits(by_vector.slice(0, k), "_distance")
        ranked = RRFReranker().rerank_hybrid(
            words, by_vector.drop_columns(["_distance"]), by_words.drop_columns(["_score"])
        )
        return self._hits(ranked.slice(0, k), "_relevance_score")

    def require(self, column: _Stored) -> None:
        """Refuse an index without one of the outputs that ``crem embed`` writes by a setting.

        Raises:
            ConfigError: with the setting.
        """
        if column not in self.schema.names:
            what, setting = _WRITTEN_BY[column]
            raise ConfigError(
                f"the index {self._place!r} has no {what}; run crem embed with {setting} --fresh, and crem index again"
            )

    def rerank(self, hits: Sequence[Hit], query_QD: NDArray[np.floating], k: int) -> list[Hit]:
        """The ``k`` best of some hits by MaxSim, which becomes their score.

        Args:
            query_QD: the chorus states of the query, each of unit length.

        Raises:
            ConfigError: the index has no states, or is damaged.
        """
        self.require("states")
        if not hits:
            return []
        stored = self.column([hit.row for hit in hits], "states")
        with self._damage_explained():
            scores_N = max_sim(query_QD, np.stack([vectors_of(states.values) for states in stored]))
        best = np.argsort(-scores_N, kind="stable")[:k]
        return [replace(hits[at], score=float(scores_N[at])) for at in best]

    def column(self, rows: Sequence[int], name: str) -> list[Any]:
        """The values of a column at the addresses of hits, in their order."""
        with self._damage_explained():
            taken = self._dataset._take_rows(list(rows), columns=[name])
            return [value.as_py() if not pa.types.is_list(taken[name].type) else value for value in taken[name]]

    def _nearest(self, vector: NDArray[np.float32], k: int, where: str | None) -> pa.Table:
        nearest = {
            "column": "embedding",
            "q": np.ascontiguousarray(vector, np.float32),
            "k": min(k, self.summary.count),
            "metric": "dot",
            "nprobes": self.summary.probes,
            "refine_factor": self.summary.refine,
        }
        with self._damage_explained(where):
            return self._dataset.scanner(
                columns=[*self._shown, "_distance"], nearest=nearest, **self._filter(where)
            ).to_table()

    @staticmethod
    def _filter(where: str | None) -> dict[str, Any]:
        return {"with_row_id": True} | ({"filter": where, "prefilter": True} if where else {})

    def _hits(self, found: pa.Table, score: str) -> list[Hit]:
        kept = [name for name in self._shown if name not in ("id", "uri", "text")]
        return [
            Hit(
                id=row["id"],
                score=1 - row[score] if score == "_distance" else row[score],
                uri=row["uri"],
                text=row["text"],
                columns={name: row[name] for name in kept},
                row=row["_rowid"],
            )
            for row in found.to_pylist()
        ]

    @contextmanager
    def _damage_explained(self, where: str | None = None) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, pa.ArrowException, ValueError) as error:
            detail = " ".join(str(error).split())[:300]
            if where is not None and _is_of_filter(error):
                columns = ", ".join(f"{name} ({self._dataset.schema.field(name).type})" for name in self._shown)
                raise ConfigError(f"--where {where!r} cannot be used: {detail}; the columns are {columns}") from error
            raise ConfigError(
                f"the index {self._place!r} is damaged: {type(error).__name__}: {detail}; run crem index into it again"
                " with --fresh"
            ) from error


def _is_of_filter(error: Exception) -> bool:
    """Whether Lance complains of the filter, for which it has no exception of its own."""
    return isinstance(error, ValueError) and any(
        words in str(error) for words in ("Schema error", "parsing statement", "filter expression", "sql parser", "SQL")
    )
