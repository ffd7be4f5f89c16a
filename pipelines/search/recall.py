"""recall@10 of an index against exact search, for a sample of its own vectors.

A vector finds itself first; the ten that count are the next ones. A hit counts if it scores as high as the tenth of the
exact ones, so that of vectors that are equal any may be found. The exact scores come from one pass over all vectors, a
task for some fragments, which keeps the best scores of the sample and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.search.index_dataset import open_dataset
from pipelines.tables.storage import Folder

__all__ = ["RECALL_AT", "measure_recall"]

RECALL_AT = 10
_EPSILON = 1e-5
"""By which float32 sums in different orders differ."""
_BATCH_ROWS = 16_384
_FRAGMENTS = 8
"""Of a task."""


@dataclass(frozen=True)
class _Scan:
    version: int
    fragments: tuple[int, ...]
    sample_QD: NDArray[np.float32]


def measure_recall(
    dataset: Any,
    target: Folder,
    size: int,
    each: Callable[[Callable[[_Scan], NDArray[np.float32]], Iterable[_Scan]], Iterable[NDArray[np.float32]]],
    **probing: int,
) -> float:
    """The mean over a sample of ``size`` vectors, always the same one.

    Args:
        each: runs a task for some fragments each.
        probing: ``nprobes`` and ``refine_factor`` of the search.
    """
    rows = dataset.count_rows()
    chosen = np.sort(np.random.default_rng(0).choice(rows, min(size, rows), replace=False))
    sample_QD = vectors_of(dataset.take(chosen.tolist(), columns=["embedding"])["embedding"].combine_chunks())
    numbers = [fragment.fragment_id for fragment in dataset.get_fragments()]
    scans = [
        _Scan(dataset.version, tuple(numbers[at : at + _FRAGMENTS]), sample_QD)
        for at in range(0, len(numbers), _FRAGMENTS)
    ]
    best = np.concatenate(list(each(partial(_best_scores, target=target), scans)), axis=1)
    exact = -np.sort(-best, axis=1)[:, 1 : RECALL_AT + 1]
    least_Q = exact[:, -1] - _EPSILON
    found = 0
    for vector, least in zip(sample_QD, least_Q, strict=True):
        nearest = {"column": "embedding", "q": vector, "k": RECALL_AT + 1, "metric": "dot", **probing}
        hits = dataset.scanner(columns=["embedding", "_distance"], nearest=nearest).to_table()
        scores = np.sort(vectors_of(hits["embedding"].combine_chunks()) @ vector)[::-1][1:]
        found += int((scores >= least).sum())
    return found / exact.size


def vectors_of(column: Any) -> NDArray[np.float32]:
    """[N, D] of a column of vectors without nulls."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values.reshape(len(column), -1), dtype=np.float32)


def _best_scores(scan: _Scan, *, target: Folder) -> NDArray[np.float32]:
    """In a worker: the highest scores [Q, 11] of the sample among the vectors of some fragments."""
    dataset = open_dataset(target, scan.version)
    best = np.full((len(scan.sample_QD), RECALL_AT + 1), -np.inf, np.float32)
    for number in scan.fragments:
        for batch in dataset.get_fragment(number).to_batches(columns=["embedding"], batch_size=_BATCH_ROWS):
            scores = np.concatenate([best, scan.sample_QD @ vectors_of(batch.column(0)).T], axis=1)
            best = np.partition(scores, -RECALL_AT - 1, axis=1)[:, -RECALL_AT - 1 :]
    return best
