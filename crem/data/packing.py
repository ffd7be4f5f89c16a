"""Compression-aware attention without a mask, for sequences packed into one row (method.md §3).

The sequences follow each other without padding. ``two_part`` plans the calls; ``crem.model.attention`` runs them.

Shape suffixes: T tokens, G sequences of a group, Q and K queries and keys of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from crem.data.prompts import Segment

__all__ = ["Group", "TwoPart", "hidden_from_answer", "two_part"]

Array = TypeVar("Array", Tensor, NDArray[Any])

_SHORTEST = 0.75
"""A sequence joins a call whose longest is at most 1 / 0.75 of its own length. Source: ours, bench_attention."""


def hidden_from_answer(segments: Array, template_visible: bool) -> Array:
    """True at the keys that Q and A must not see when z = 1: V and T, and S unless it is visible."""
    hidden = (segments == Segment.V) | (segments == Segment.T)
    return hidden if template_visible else hidden | (segments == Segment.S)


class Group(NamedTuple):
    """One call: the queries of each of G sequences over its keys, causal; the last query sees the last key."""

    queries_GQ: Tensor
    """int64 positions in the row; short sequences repeat their last one, behind what any real query sees"""
    keys_GK: Tensor
    triangle_QK: Tensor | None
    """bool; None for as many queries as keys, which is plain causal attention"""


@dataclass(frozen=True)
class TwoPart:
    """How the attention of one row is split into calls; the same for every layer."""

    groups: tuple[Group, ...]
    order_T: Tensor
    """int64: position of each token's result among the results of all groups"""

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
    """The calls for sequences that follow each other in a single row.

    Args:
        segments: int8 [T] of ``Segment`` for each sequence, V and T in any order before U, then Q and A (method.md §2).
        z: for each sequence, whether its answer must come from the chorus tokens alone.
    """
    spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    at = 0
    for segments_T, bit in zip(segments, z, strict=True):
        places = np.arange(at, at + len(segments_T))
        at += len(segments_T)
        prefix = int((segments_T < Segment.Q).sum()) if bit else len(segments_T)
        spans.append((places[:prefix], places[:prefix]))
        if prefix < len(segments_T):
            spans.append((places[prefix:], places[~hidden_from_answer(segments_T, template_visible)]))
    # members of a group have equally many keys before their queries, or the ends of both would not align
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
