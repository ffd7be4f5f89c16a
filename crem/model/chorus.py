"""Chorus tokens: K distinct ids of the vocabulary into which the model compresses its input (method.md §2).

They are ordinary rows of the input embedding. Qwen2-VL's matrix has spare rows beyond its tokenizer, which are used
before the matrix grows, so a CREM checkpoint stays a stock checkpoint of its backbone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crem.data.prompts import Segment

__all__ = ["add_chorus_tokens", "chorus_states", "chorus_token_ids", "embedding_of", "initialise_rows", "pool"]


def chorus_token(index: int) -> str:
    """Name of chorus token ``index`` in the tokenizer."""
    return f"<|chorus_{index}|>"


def chorus_token_ids(tokenizer: Any, count: int) -> list[int]:
    """Ids of the first ``count`` chorus tokens; an assertion fails if the tokenizer lacks them.

    Without chorus tokens (``count`` 0, the baseline) the one id is that of ``<|endoftext|>``, whose state is pooled.
    """
    if count == 0:
        return [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    ids = tokenizer.convert_tokens_to_ids([chorus_token(i) for i in range(count)])
    assert len(set(ids)) == count and None not in ids, f"tokenizer has no {count} chorus tokens: {ids}"
    return list(ids)


def add_chorus_tokens(tokenizer: Any, count: int) -> list[int]:
    """Add ``count`` chorus tokens to the tokenizer; returns their ids."""
    if count:
        tokenizer.add_tokens([chorus_token(i) for i in range(count)], special_tokens=True)
    return chorus_token_ids(tokenizer, count)


@torch.no_grad()
def initialise_rows(embedding_ND: Tensor, chorus_ids: list[int], *, seed: int = 0) -> None:
    """Set the chorus rows to the mean of the other rows plus noise of their own scale, so that the K are distinct.

    Source: transformers' initialisation of added tokens (mean and covariance of the old rows), with a diagonal
    covariance. Reserved rows of a pretrained matrix are close to zero and would all start as the same token.
    """
    if not chorus_ids:
        return
    rest = embedding_ND[: min(chorus_ids)].float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(chorus_ids), rest.shape[1], generator=generator).to(rest.device)
    rows = rest.mean(0) + noise * rest.std(0)
    embedding_ND[torch.tensor(chorus_ids, device=rest.device)] = rows.to(embedding_ND.dtype)


def chorus_states(hidden_BTD: Tensor, segments_BT: Tensor, count: int) -> Tensor:
    """The last-layer states of the chorus tokens [N, K, D], in the order of the batch's sequence numbers.

    Every sequence has exactly ``count`` chorus tokens, consecutive and in order of the sequences.
    """
    return hidden_BTD[segments_BT == Segment.U].unflatten(0, (-1, count))


def embedding_of(states_NKD: Tensor) -> Tensor:
    """The embedding: L2-normalised mean of the chorus states (method.md §4); float32 [N, D]."""
    return F.normalize(states_NKD.float().mean(1), dim=-1)


def pool(hidden_BTD: Tensor, segments_BT: Tensor, count: int) -> Tensor:
    """``embedding_of`` the ``chorus_states``."""
    return embedding_of(chorus_states(hidden_BTD, segments_BT, count))
