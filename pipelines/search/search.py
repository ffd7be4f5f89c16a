"""``crem search``: an index opened for queries. A query by another model than the index was made by is refused."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crem.errors import CheckpointError, ConfigError
from pipelines.search.index import ITEMS, VECTORS, IndexSummary
from pipelines.tables.schema import ArrowRow
from pipelines.tables.storage import Folder
from pipelines.tables.vector_types import prefix_of

if TYPE_CHECKING:
    import crem

__all__ = ["Hit", "VectorIndex", "search"]


@dataclass(frozen=True)
class Hit:
    """One result, best first; ``score`` is the cosine."""

    id: Any
    """As the items have it."""
    score: float
    uri: str | None
    text: str | None


class VectorIndex:
    """An index opened for search. A remote one is first copied to a temporary folder.

    Raises:
        ConfigError: there is no complete index, or it is damaged.
    """

    def __init__(self, place: str):
        folder = Folder.at(place)
        summary = IndexSummary.read(folder)
        if summary is None:
            raise ConfigError(f"{place!r} is not an index (no {IndexSummary.FILE}); run crem index into it first")
        self.summary = summary
        self._scratch = None if folder.is_local else tempfile.TemporaryDirectory(prefix="crem-index-")
        self._place = place
        with self._damage_explained():
            if self._scratch is not None:
                for name in (VECTORS, ITEMS):
                    folder.fs.get_file(folder.path(name), str(Path(self._scratch.name) / name))
            root = Path(self._scratch.name if self._scratch else folder.uri)
            self._vectors = faiss.read_index(str(root / VECTORS))
            self._items = pq.ParquetFile(root / ITEMS)
            counts = {
                IndexSummary.FILE: summary.count,
                VECTORS: self._vectors.ntotal,
                ITEMS: self._items.metadata.num_rows,
            }
            if len(set(counts.values())) > 1:
                raise ValueError(f"the numbers of items differ: {counts}")
            if isinstance(self._vectors, faiss.IndexIVF):
                self._vectors.nprobe = summary.probes
        groups = (self._items.metadata.row_group(i).num_rows for i in range(self._items.num_row_groups))
        self._starts = np.cumsum([0, *groups])

    @contextmanager
    def _damage_explained(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, pa.ArrowException, ValueError) as error:
            raise ConfigError(
                f"the index {self._place!r} is damaged: {type(error).__name__}: {error}; run crem index into it again"
            ) from error

    @property
    def fingerprint(self) -> str:
        return self.summary.fingerprint

    def stored(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors [N, D] at these positions, as exact as the index keeps them."""
        if isinstance(self._vectors, faiss.IndexIVF):
            self._vectors.make_direct_map()
        found: NDArray[np.float32] = self._vectors.reconstruct_batch(np.ascontiguousarray(positions, np.int64))
        return found

    def search(self, vectors: NDArray[np.float32], k: int) -> list[list[Hit]]:
        """The ``k`` best hits of each of the query vectors [N, dim], fewer if the index holds fewer."""
        if k < 1:
            raise ConfigError(f"k={k} asks for no result; give 1 or more")
        scores, positions = self._vectors.search(np.ascontiguousarray(vectors, np.float32), min(k, self.summary.count))
        rows = self._rows(positions)
        return [
            [Hit(score=float(s), **rows[int(p)]) for s, p in zip(of_scores, of_query, strict=True) if p >= 0]
            for of_scores, of_query in zip(scores, positions, strict=True)
        ]

    def _rows(self, positions: NDArray[np.int64]) -> dict[int, ArrowRow]:
        """Item rows by position, reading each row group at most once."""
        wanted = np.unique(positions[positions >= 0])
        groups = np.searchsorted(self._starts, wanted, side="right") - 1
        found: dict[int, ArrowRow] = {}
        for group in np.unique(groups):
            of_group = wanted[groups == group]
            with self._damage_explained():
                taken = self._items.read_row_group(int(group)).take(pa.array(of_group - self._starts[group]))
            found.update(zip(of_group.tolist(), taken.to_pylist(), strict=True))
        return found


def search(index: str, model: str | Path | crem.Crem, query: Any, k: int) -> list[Hit]:
    """The ``k`` items of ``index`` nearest to ``query``, embedded by ``model``.

    Args:
        index: folder or URI of an index.
        model: checkpoint folder or URI; a loaded ``crem.Crem`` is taken as it is.
        query: a ``crem.Item``, or its shorthands.

    Raises:
        ConfigError: there is no index.
        CheckpointError: another model made the index.
        ItemError: the query cannot be embedded.
    """
    import crem

    opened = VectorIndex(index)
    count = opened.summary.chorus_tokens
    loaded = crem.load(model, chorus_tokens=count) if isinstance(model, str | Path) else model
    if loaded.fingerprint != opened.fingerprint:
        raise CheckpointError(
            f"the index {index} was made by model {opened.fingerprint} ({opened.summary.model}), and this model is "
            f"{loaded.fingerprint}; search with that model, or embed and index again with this one"
        )
    return opened.search(prefix_of(loaded.embed([query]), opened.summary.dim), k)[0]
