"""Compression-aware attention (method.md section 3).

For query position i and key position j of one sequence, with the per-sample bit z:

    M[i,j] = 0           if z = 1 and i in Q or A and j in V or T
    M[i,j] = 1(j <= i)   otherwise

Padding and, where sequences are packed, the other sequences of the row are never visible. The dense mask here is exact
for every layout; for one sequence per row with padding on the right and no z = 1, plain causal attention is the same
thing and needs no mask.

Shape suffixes: N sequences, B rows, T tokens.
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
