"""Which targets become hard negatives of a row: a rank window, a false-negative rule, and what is never one.

The nearest targets that are not a row's own are the hard negatives, and among them are the false ones: targets that
answer the query and that nobody labelled. NV-Retriever (arXiv 2407.15831) compares what to do about them and finds best
to drop every candidate whose similarity to the query is above a share of the positive's (TopK-PercPos, 95 %); a margin
(TopK-MarginPos) and skipping the first ranks (TopK-shifted) are its other rules. Here all three can be set.

Never a negative, whatever their similarity: what ``ItemNumbers.positives`` names, which is the targets of all rows that
share the query, the targets of queries that share the target, and all of the same content as these or as the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crem.config import MineConfig

__all__ = ["Candidates", "choose", "threshold", "top_candidates"]

_TILE_ROWS = 128


@dataclass(frozen=True)
class Candidates:
    """The nearest targets of some queries, best first; the place after the last has number -1 and score -inf.

    N is the number of queries, L the last rank.
    """

    numbers_NL: NDArray[np.int64]
    scores_NL: NDArray[np.float32]


def top_candidates(
    queries_ND: NDArray[np.float32],
    targets_TD: NDArray[np.float32],
    numbers_T: NDArray[np.int64],
    contents_T: NDArray[np.int64],
    forbidden: Sequence[NDArray[np.int64]],
    last_rank: int,
    earlier: Candidates | None = None,
) -> Candidates:
    """The ``last_rank`` nearest targets of each query, in one block of targets and in ``earlier`` ones.

    Of equal scores the lower number comes first, so the result does not depend on how targets are split into blocks
    (but for the last bit of a product of matrices). Memory: 128 queries by T targets.

    Args:
        numbers_T: number of each target, unique over all blocks, ascending.
        contents_T: content key of each target.
        forbidden: of each query, the content keys that must not be found.
    """
    order = np.argsort(contents_T, kind="stable")
    sorted_contents = contents_T[order]
    found = earlier or Candidates(
        np.full((len(queries_ND), last_rank), -1, np.int64), np.full((len(queries_ND), last_rank), -np.inf, np.float32)
    )
    numbers_NL, scores_NL = found.numbers_NL.copy(), found.scores_NL.copy()
    keep = min(last_rank, len(numbers_T))
    for start in range(0, len(queries_ND), _TILE_ROWS):
        tile = slice(start, start + _TILE_ROWS)
        scores = queries_ND[tile] @ targets_TD.T
        for row, keys in enumerate(forbidden[tile]):
            begins, ends = (np.searchsorted(sorted_contents, keys, side) for side in ("left", "right"))
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                scores[row, order[begin:end]] = -np.inf
        # of equal scores at the edge argpartition takes any: widen to all that are as good as the last kept
        edge = np.partition(scores, len(numbers_T) - keep, axis=1)[:, len(numbers_T) - keep]
        for row in range(len(scores)):
            good = np.flatnonzero((scores[row] >= edge[row]) & (scores[row] > -np.inf))
            all_numbers = np.concatenate([numbers_NL[start + row], numbers_T[good]])
            all_scores = np.concatenate([scores_NL[start + row], scores[row, good]])
            best = np.lexsort((all_numbers, -all_scores))[:last_rank]
            numbers_NL[start + row], scores_NL[start + row] = all_numbers[best], all_scores[best]
    return Candidates(numbers_NL, scores_NL)


def threshold(positive: float, config: MineConfig) -> float:
    """The similarity above which a candidate counts as a false negative.

    For a positive similarity this is the lower of ``max_ratio`` times it and ``margin`` below it; the distance keeps
    its size below zero, where the ratio alone would raise the threshold above the positive.
    """
    return positive - max((1 - config.max_ratio) * abs(positive), config.margin)


def choose(
    numbers_L: NDArray[np.int64],
    scores_L: NDArray[np.float32],
    contents_L: NDArray[np.int64],
    positive: float,
    row_id: int,
    config: MineConfig,
) -> tuple[list[int], int]:
    """Places, among the candidates of one row, of its negatives; and how many of the window the rule dropped.

    Args:
        contents_L: content keys of the candidates; of several of one content only the nearest is taken.
        positive: similarity of the row's query to its target.
        row_id: with the seed it decides a sample.
    """
    first, last = config.ranks
    window = [place for place in range(first - 1, min(last, len(numbers_L))) if numbers_L[place] >= 0]
    limit = threshold(positive, config)
    kept: dict[int, int] = {}
    for place in window:
        if scores_L[place] <= limit:
            kept.setdefault(int(contents_L[place]), place)
    dropped = sum(bool(scores_L[place] > limit) for place in window)
    places = list(kept.values())
    if config.pick == "sample" and len(places) > config.negatives:
        rng = np.random.default_rng([config.seed, row_id & (2**63 - 1)])
        places = sorted(rng.choice(places, config.negatives, replace=False).tolist())
    return places[: config.negatives], dropped
