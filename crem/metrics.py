"""Measures of embeddings: alignment and uniformity (Wang and Isola, arXiv 2005.10242), in-batch Precision@1."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["alignment", "precision_at_1", "uniformity"]


def alignment(queries_QD: Tensor, targets_QD: Tensor) -> float:
    """Mean squared distance of pairs of unit vectors, 0 (equal) to 4 (opposite); NaN without pairs."""
    return float((queries_QD - targets_QD).square().sum(1).mean())


def uniformity(vectors_ND: Tensor) -> float:
    """log of the mean of exp(-2 d^2) over pairs of unit vectors: 0 collapsed, about -4 spread out; NaN below two."""
    if len(vectors_ND) < 2:
        return float("nan")
    cosine_NN = vectors_ND.float() @ vectors_ND.float().T
    upper = torch.triu_indices(len(vectors_ND), len(vectors_ND), offset=1, device=vectors_ND.device)
    squared = 2 - 2 * cosine_NN[upper[0], upper[1]]
    return float(squared.mul(-2).exp().mean().log())


def precision_at_1(queries_QD: Tensor, targets_QD: Tensor, query_keys_Q: Tensor, target_keys_Q: Tensor) -> float:
    """Share of queries whose nearest target is correct: their own, one with the same content, or the target of a query
    with the same content. Keys are content hashes; those below 0 match nothing. NaN without queries."""
    if not len(queries_QD):
        return float("nan")
    nearest_Q = (queries_QD @ targets_QD.T).argmax(1)
    right_Q = nearest_Q == torch.arange(len(nearest_Q), device=nearest_Q.device)
    for keys_Q in (query_keys_Q, target_keys_Q):
        right_Q |= (keys_Q[nearest_Q] == keys_Q) & (keys_Q >= 0)
    return float(right_Q.float().mean())
