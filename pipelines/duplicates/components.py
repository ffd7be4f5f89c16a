"""Connected components of near pairs, in one process: pairs are few beside rows, and bounded by ``MAX_PAIRS``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crem.errors import ResourceError
from pipelines.duplicates.libraries import library

__all__ = ["MAX_PAIRS", "Components", "components"]

MAX_PAIRS = 50_000_000
"""Near pairs that the driver holds. Source: ours, see tests/bench/README.md for the memory that they take."""


@dataclass(frozen=True)
class Components:
    """Items that are near to some other, by id."""

    ids: NDArray[np.int64]
    """[N] sorted"""
    representatives: NDArray[np.int64]
    """[N] the smallest id of each item's component"""

    def of(self, item: int) -> int:
        """The representative of an item; itself where nothing is near to it."""
        at = int(np.searchsorted(self.ids, item))
        return int(self.representatives[at]) if at < len(self.ids) and self.ids[at] == item else item


def components(first: NDArray[np.int64], second: NDArray[np.int64]) -> Components:
    """The components of a graph given by its edges.

    Raises:
        ResourceError: there are more than ``MAX_PAIRS``.
    """
    if len(first) > MAX_PAIRS:
        raise ResourceError(
            f"{len(first)} near pairs are over the limit of {MAX_PAIRS}; make prepare.near_image_bits smaller or "
            "prepare.near_text_jaccard larger, or prepare the corpus in parts"
        )
    if not len(first):
        return Components(np.empty(0, np.int64), np.empty(0, np.int64))
    sparse, graph = (library(f"scipy.{name}", "prepare.near_duplicates") for name in ("sparse", "sparse.csgraph"))
    ids, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    i, j = places[: len(first)], places[len(first) :]
    edges = sparse.coo_matrix((np.ones(len(i), np.bool_), (i, j)), shape=(len(ids), len(ids)))
    count, labels = graph.connected_components(edges, directed=False)
    smallest = np.full(count, len(ids))
    np.minimum.at(smallest, labels, np.arange(len(ids)))
    return Components(ids, ids[smallest[labels]])
