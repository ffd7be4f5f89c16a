"""CREM's losses as pure functions (method.md section 4); none touches a process group.

    L = alpha_r * L_r + alpha_g * L_g

Each loss is returned by name, so that logs and gradients can be traced to a term; ``joint_loss`` is the one place that
weighs and sums. Shape suffixes: Q queries, C candidates (the Q targets, then hard negatives), D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crem.config import LossConfig

__all__ = ["Losses", "info_nce", "joint_loss", "lm_loss"]


@dataclass(frozen=True)
class Losses:
    """The terms of one step, each a float32 scalar; ``total`` is what is differentiated."""

    retrieval: Tensor
    generation: Tensor
    total: Tensor


def info_nce(
    queries_QD: Tensor, candidates_CD: Tensor, keys_C: Tensor, *, temperature: float, symmetric: bool = False
) -> Tensor:
    """Mean over queries of -log softmax(cos / temperature) at the own target.

    Candidate i is the target of query i; the rest are negatives. A candidate with the same content key as the own
    target is no negative and is left out (keys below 0 match nothing).

    Args:
        queries_QD, candidates_CD: float32, unit length, C >= Q.
        keys_C: int64 content hash of each candidate.
        symmetric: average with the direction from each target to all queries.
    """
    count = queries_QD.shape[0]
    if count == 0:
        return (queries_QD.sum() + candidates_CD.sum()) * 0.0
    logits_QC = queries_QD @ candidates_CD.T / temperature
    own = torch.arange(count, device=logits_QC.device)
    same_QC = (keys_C[:count, None] == keys_C[None, :]) & (keys_C[None, :] >= 0)
    same_QC[own, own] = False
    logits_QC = logits_QC.masked_fill(same_QC, float("-inf"))
    loss = F.cross_entropy(logits_QC, own)
    if symmetric:
        loss = (loss + F.cross_entropy(logits_QC[:, :count].T, own)) / 2
    return loss


def lm_loss(loss_sum: Tensor, global_answer_tokens: Tensor | int) -> Tensor:
    """Mean of -log p over the answer tokens of the *global* batch: ``loss_sum`` may be one rank's share of the sum."""
    return loss_sum / max(int(global_answer_tokens), 1)


def joint_loss(retrieval: Tensor, generation: Tensor, config: LossConfig) -> Losses:
    """Weigh and sum the terms."""
    return Losses(retrieval, generation, config.alpha_r * retrieval + config.alpha_g * generation)
