"""Compression-aware attention (method.md §3), as a dense mask and without any mask.

For query position i and key position j of one sequence, with the per-sample bit z:

    M[i,j] = 0           if z = 1 and i in Q or A and j in V or T
    M[i,j] = 1(j <= i)   otherwise

Padding and, where sequences share a row, the other sequences of the row are never visible.

Two forms, tested to agree:

- ``compression_aware_mask``: the dense mask, exact for every layout; quadratic in the length of a row. The oracle.
- ``crem.data.packing.two_part``: for training. All sequences share one row without padding, so every other layer of
  the model computes real tokens only. Attention is split into causal calls over whole sequences (z = 0) or their
  prefixes (z = 1), and causal calls of [Q A] over [S U Q A] aligned at the end (z = 1). Sequences of similar length
  share a call, which pads the shorter ones: PyTorch's fused causal kernel for the first kind, its memory-efficient
  kernel with a triangular mask for the few [Q A] of the second.

Shape suffixes: N sequences, B rows, T tokens, H heads, G sequences of a group, Q and K queries and keys of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from crem.data.packing import TwoPart, hidden_from_answer
from crem.data.prompts import Segment

__all__ = ["TWO_PART", "attend", "compression_aware_mask"]

TWO_PART = "crem_two_part"
"""Name under which transformers finds the attention function."""


def compression_aware_mask(
    segments_BT: Tensor, sequence_ids_BT: Tensor, z_N: Tensor, *, template_visible: bool = True
) -> Tensor:
    """The dense mask: bool [B, 1, T, T], True where query i may look at key j.

    Args:
        segments_BT: integer [B, T] of ``Segment``; PAD anywhere.
        sequence_ids_BT: int64 [B, T], the sequence of each token, -1 for padding.
        z_N: bool [N]; True where the answer must come from the chorus tokens alone.
        template_visible: whether the template tokens before the sample stay visible (open in the paper).
    """
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    same_BTT = sequence_ids_BT[:, :, None] == sequence_ids_BT[:, None, :]
    z_BT = z_N[sequence_ids_BT.clamp(min=0)] & (segments_BT >= Segment.Q)
    hidden_BT = hidden_from_answer(segments_BT, template_visible)
    visible_BTT = causal_TT & same_BTT & ~(z_BT[:, :, None] & hidden_BT[:, None, :])
    # padding has id -1 and sees only padding, so that no softmax is empty; its result is not used
    return visible_BTT[:, None]


_PRODUCTS_UP_TO = 256
"""Keys up to which attention on CPU is two matrix products. Source: ours, measured (``attend``)."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """``F.scaled_dot_product_attention`` of [G, H, Q, width] over [G, H, K, width], by matrix products where faster.

    Keys and values may have fewer heads than the queries (grouped-query attention).

    On CPU the backward pass of PyTorch's fused kernel took 66 ms in bf16, matrix products 6 (152 x 3 heads of 64
    patches, one thread of an AVX-512 CPU); beyond a few hundred keys the fused kernel wins.
    """
    products = query.device.type == "cpu" and key.shape[2] <= _PRODUCTS_UP_TO
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and (products or mask is not None):  # with a mask they would fall to the unfused kernel on GPUs
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if not products:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=key.shape[1] < query.shape[1],
        )
    scores = (query * scale) @ key.transpose(-1, -2)
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout) @ value


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    two_part: TwoPart | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: by ``two_part`` where the batch has one, else by the mask or causally.

    ``query`` is [B, H, T, width], ``key`` and ``value`` have the key-value heads; returns [B, T, H, width].
    """
    if two_part is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query_TH, key_TH, value_TH = (t[0].transpose(0, 1) for t in (query, key, value))
    results = []
    for queries_GQ, keys_GK, triangle_QK in two_part.groups:
        q, k, v = (
            rows.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
            for rows, places in ((query_TH, queries_GQ), (key_TH, keys_GK), (value_TH, keys_GK))
        )
        out = attend(
            q,
            k,
            v,
            triangle_QK,
            causal=triangle_QK is None,
            scale=kwargs["scaling"],
            dropout=kwargs.get("dropout", 0.0),
        )
        results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, two_part.order_T)[None], None


AttentionInterface.register(TWO_PART, torch.compiler.disable(_attention))  # loops over the batch's groups
AttentionMaskInterface.register(TWO_PART, sdpa_mask)
