"""Compression-aware attention (method.md section 3), as a dense mask and without any mask.

For query position i and key position j of one sequence, with the per-sample bit z:

    M[i,j] = 0           if z = 1 and i in Q or A and j in V or T
    M[i,j] = 1(j <= i)   otherwise

Padding and, where sequences share a row, the other sequences of the row are never visible.

Two forms, tested to agree:

- ``compression_aware_mask``: the dense mask, exact for every layout; quadratic in the length of a row. The oracle.
- ``two_part``: for training. All sequences stand in one row without padding, so every other layer of the model sees
  real tokens only. Attention falls into causal calls over whole sequences (z = 0) or their prefixes (z = 1), and causal
  calls of [Q A] over [S U Q A] aligned at the end (z = 1). Sequences of similar length share a call: PyTorch's fused
  causal kernel for the first kind, its memory-efficient one with a triangle of the few [Q A] for the second. The
  padding of that grouping is the only one.

Shape suffixes: N sequences, B rows, T tokens, H heads, G sequences of a group, Q and K queries and keys of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from crem.data.prompts import Segment

__all__ = ["TWO_PART", "Group", "TwoPart", "attend", "compression_aware_mask", "hidden_from_answer", "two_part"]

TWO_PART = "crem_two_part"
"""Name under which transformers finds the attention function."""
_SHORTEST = 0.75
"""A sequence joins a call whose longest is at most 1 / 0.75 of its own length. Source: ours, bench_attention."""


def hidden_from_answer(segments_BT: Tensor, template_visible: bool) -> Tensor:
    """bool [B, T]: the keys that Q and A must not see when z = 1, i.e. V and T (and S unless it is visible)."""
    hidden_BT = (segments_BT == Segment.V) | (segments_BT == Segment.T)
    return hidden_BT if template_visible else hidden_BT | (segments_BT == Segment.S)


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
    # padding has the number -1 and sees only padding, so that softmax has something to normalise; nobody reads it
    return visible_BTT[:, None]


_PRODUCTS_UP_TO = 256
"""Keys up to which attention on CPU is two products. Source: ours, measured (``attend``)."""


class Group(NamedTuple):
    """One call: each of G sequences' queries over its keys, causal, the last query seeing the last key."""

    queries_GQ: Tensor
    """int64 places in the row; short sequences repeat their last one, behind what any real query sees"""
    keys_GK: Tensor
    triangle_QK: Tensor | None
    """bool; None where there are as many queries as keys, which is plain causal attention"""


@dataclass(frozen=True)
class TwoPart:
    """How the attention of one row falls into calls; the same for every layer."""

    groups: tuple[Group, ...]
    order_T: Tensor
    """int64: where each token's result stands among the results of all groups"""

    def to(self, device: torch.device | str) -> TwoPart:
        """The same on ``device``."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        groups = tuple(Group(moved(q), moved(k), None if mask is None else moved(mask)) for q, k, mask in self.groups)
        return TwoPart(groups, moved(self.order_T))

    def with_token(self) -> TwoPart:
        """The same with one more token at the end of the row, which sees itself alone."""
        place = self.order_T.new_full((1, 1), self.order_T.shape[0])
        done = sum(group.queries_GQ.numel() for group in self.groups)
        return TwoPart((*self.groups, Group(place, place, None)), F.pad(self.order_T, (0, 1), value=done))

    @property
    def padding_share(self) -> float:
        """Share of the queries that are padding."""
        return 1 - self.order_T.shape[0] / max(1, sum(g.queries_GQ.numel() for g in self.groups))


def two_part(segments: Iterable[NDArray[np.int8]], z: Iterable[bool], *, template_visible: bool = True) -> TwoPart:
    """The calls for sequences that stand one behind the other in a single row.

    Args:
        segments: int8 [T] of ``Segment`` for each sequence, in order of the prompt (method.md section 2).
        z: for each sequence, whether its answer must come from the chorus tokens alone.
    """
    spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    at = 0
    for segments_T, bit in zip(segments, z, strict=True):
        places = np.arange(at, at + len(segments_T))
        at += len(segments_T)
        prefix = int(np.searchsorted(segments_T, Segment.Q)) if bit else len(segments_T)
        spans.append((places[:prefix], places[:prefix]))
        if prefix < len(segments_T):
            kept = (segments_T >= Segment.U) | ((segments_T == Segment.S) & template_visible)
            spans.append((places[prefix:], places[kept]))
    # what precedes the queries among the keys is the same for all members of a group, or their ends would not align
    spans.sort(key=lambda span: (len(span[1]) - len(span[0]), -len(span[0])))
    groups: list[Group] = []
    order_T = np.empty(at, dtype=np.int64)
    done = start = 0
    while start < len(spans):
        ahead, longest = len(spans[start][1]) - len(spans[start][0]), len(spans[start][0])
        stop = start
        while (
            stop < len(spans)
            and len(spans[stop][1]) - len(spans[stop][0]) == ahead
            and len(spans[stop][0]) >= _SHORTEST * longest
        ):
            stop += 1
        members = spans[start:stop]
        queries_GQ, keys_GK = (np.stack([_filled(m[i], longest + i * ahead) for m in members]) for i in (0, 1))
        triangle = torch.ones(longest, longest + ahead, dtype=torch.bool).tril(ahead) if ahead else None
        groups.append(Group(torch.from_numpy(queries_GQ), torch.from_numpy(keys_GK), triangle))
        for number, (queries, _) in enumerate(members):
            order_T[queries] = done + number * longest + np.arange(len(queries))
        done += len(members) * longest
        start = stop
    return TwoPart(tuple(groups), torch.from_numpy(order_T))


def _filled(places: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    return places[np.minimum(np.arange(length), len(places) - 1)]


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
    """``F.scaled_dot_product_attention`` of [G, H, Q, width] over [G, H, K, width], by products where that is faster.

    Keys and values may have fewer heads, each for several of the queries'.

    On CPU the backward pass of PyTorch's fused kernel took 66 ms in bf16 where products took 6 (152 x 3 heads of 64
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
    """transformers' attention interface: by ``two_part`` where the batch brings one, else by the mask or causally.

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


AttentionInterface.register(TWO_PART, torch.compiler.disable(_attention))  # loops over what the batch brings
AttentionMaskInterface.register(TWO_PART, sdpa_mask)
