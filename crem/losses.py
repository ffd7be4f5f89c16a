"""CREM's losses as pure functions (method.md §4); none touches a process group.

    L = alpha_r * L_r + alpha_g * L_g

Shape suffixes: Q queries, C candidates (the Q targets, then hard negatives), D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crem.config import LossConfig

__all__ = ["info_nce", "joint_loss", "lm_loss"]


def info_nce(
    queries_QD: Tensor,
    candidates_CD: Tensor,
    *,
    query_keys: Tensor,
    candidate_keys: Tensor,
    temperature: float,
    symmetric: bool = False,
    margin: float | None = None,
) -> Tensor:
    """Mean over queries of -log softmax(cos / temperature) at the own target.

    Candidate i is the target of query i; the rest are negatives. False negatives are masked: candidates with the same
    content as the target, targets of a query with the same content, and, with a ``margin``, candidates whose similarity
    to the query exceeds that of its own target by more than the margin.

    Args:
        queries_QD, candidates_CD: float32, unit length, C >= Q.
        query_keys, candidate_keys: int64 [Q] and [C] content hashes; those below 0 match nothing.
        symmetric: average with the direction from each target to all queries, with the same mask.
    """
    count = queries_QD.shape[0]
    if count == 0:
        return (queries_QD.sum() + candidates_CD.sum()) * 0.0
    cosine_QC = queries_QD @ candidates_CD.T
    own = torch.arange(count, device=cosine_QC.device)
    false_QC = (candidate_keys[:count, None] == candidate_keys[None, :]) & (candidate_keys[None, :] >= 0)
    false_QC[:, :count] |= (query_keys[:, None] == query_keys[None, :]) & (query_keys[None, :] >= 0)
    if margin is not None:
        false_QC |= cosine_QC.detach() > cosine_QC.detach()[own, own, None] + margin
    false_QC[own, own] = False
    logits_QC = (cosine_QC / temperature).masked_fill(false_QC, float("-inf"))
    loss = F.cross_entropy(logits_QC, own)
    if symmetric:
        loss = (loss + F.cross_entropy(logits_QC[:, :count].T, own)) / 2
    return loss


def lm_loss(loss_sum: Tensor, global_answer_tokens: int) -> Tensor:
    """Mean of -log p over the answer tokens of the *global* batch: ``loss_sum`` may be one rank's share of the sum."""
    return loss_sum / max(global_answer_tokens, 1)


def joint_loss(retrieval: Tensor, generation: Tensor, config: LossConfig) -> Tensor:
    """The one place that weighs and sums the terms."""
    return config.alpha_r * retrieval + config.alpha_g * generation
