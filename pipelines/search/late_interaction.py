"""MaxSim: how near two items are by the states of their chorus tokens rather than by the mean of these.

Each state of the query looks for the state of the candidate that is most like it; the score is the mean of these best
inner products. States have unit length, so it lies between -1 and 1 and is 1 for an item with itself. The sum over the
query's vectors is ColBERT's (arXiv:2004.12832), over a few learnable tokens MetaEmbed's (arXiv:2509.18095); the mean
gives the same order and can be read beside a cosine.

It is not symmetric: what the candidate has beyond the query costs nothing.

Shape suffixes: N candidates, Q states of the query, K states of a candidate, D dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["max_sim"]


def max_sim(query_QD: NDArray[np.floating], states_NKD: NDArray[np.floating]) -> NDArray[np.float32]:
    """The scores [N] of candidates, float32."""
    candidates, tokens, dim = states_NKD.shape
    flat = states_NKD.reshape(-1, dim).astype(np.float32)
    similar_NKQ = (flat @ query_QD.astype(np.float32).T).reshape(candidates, tokens, len(query_QD))
    scores_N: NDArray[np.float32] = similar_NKQ.max(1).mean(1)
    return scores_N
