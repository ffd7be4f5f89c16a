"""Two numbers that tell whether an embedding space is healthy (Wang and Isola, arXiv 2005.10242)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["alignment", "uniformity"]


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
