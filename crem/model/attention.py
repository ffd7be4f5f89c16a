"""Compression-aware attention (method.md section 3).

For query position i and key position j of one sequence, with the per-sample bit z:

    M[i,j] = 0           if z = 1 and i in Q or A and j in V or T
    M[i,j] = 1(j <= i)   otherwise

Padding is never visible. The dense mask here is exact for every layout; where no sample of a batch has z = 1 and
padding is on the right, plain causal attention is the same thing and needs no mask (``None``).

Shape suffixes: B sequences, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crem.data.prompts import Segment

__all__ = ["compression_aware_mask", "hidden_from_answer"]


def hidden_from_answer(segments_BT: Tensor, template_visible: bool) -> Tensor:
    """bool [B, T]: the keys that Q and A must not see when z = 1, i.e. V and T (and S unless it is visible)."""
    hidden_BT = (segments_BT == Segment.V) | (segments_BT == Segment.T)
    return hidden_BT if template_visible else hidden_BT | (segments_BT == Segment.S)


def compression_aware_mask(segments_BT: Tensor, z_B: Tensor, *, template_visible: bool = True) -> Tensor:
    """The dense mask: bool [B, 1, T, T], True where query i may look at key j.

    Args:
        segments_BT: integer [B, T] of ``Segment``; PAD anywhere.
        z_B: bool [B]; True where the answer must come from the chorus tokens alone.
        template_visible: whether the template tokens before the sample stay visible (open in the paper).
    """
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    real_BT = segments_BT != Segment.PAD
    answering_BT = segments_BT >= Segment.Q
    blocked_BTT = (
        z_B[:, None, None] & answering_BT[:, :, None] & hidden_from_answer(segments_BT, template_visible)[:, None, :]
    )
    visible_BTT = causal_TT & real_BT[:, None, :] & ~blocked_BTT
    # a padding query sees itself, so that softmax has something to normalise; nobody reads its result
    visible_BTT = visible_BTT | torch.eye(length, dtype=torch.bool, device=segments_BT.device)
    return visible_BTT[:, None]
