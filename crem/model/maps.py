"""Attention of the chorus tokens over the image, and two measures of it (the paper's Figure 4).

``chorus_attention`` runs the prefix [S V T U] of each item and keeps, of every layer and head, the attention weights of
the K chorus tokens over all keys. The model's own attention computes the result; the weights are recomputed beside it
from the same queries and keys (after rotation), because fused kernels do not give them. ``image_maps`` selects
the vision tokens of one image.

The measures, for maps p_1 … p_K over the n vision tokens of one image, each of them summing to one:

- **coverage** = exp(H(mean of the p_k)) / n, with H the Shannon entropy: the share of the image that the chorus tokens
  attend to together, as an effective number of tokens: 1 where attention is even, 1 / n where it is on one token.
- **overlap** = mean cosine of p_j and p_k over all pairs j < k: 1 where all chorus tokens attend to the same
  tokens (redundant), 0 where no two attend to the same token (complementary). K even maps overlap completely, so read
  the two measures together. Not defined for one chorus token.
- **image share**: attention on vision tokens before the maps are normalised; the rest goes to template, text and other
  chorus tokens.

The paper shows maps without numbers; the definitions are ours. Shape suffixes: B items, L layers, H heads, K
chorus tokens, T keys, n vision tokens of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from crem.data.collator import Batch
from crem.data.prompts import Segment
from crem.model.crem import CremModel

__all__ = ["ImageMaps", "chorus_attention", "coverage", "image_maps", "overlap"]

_RECORDING = "crem_recording"


class ImageMaps(NamedTuple):
    """Attention of one item's chorus tokens over one image."""

    maps_Kn: Tensor
    """float32, every row sums to one"""
    share: float
    """attention on the image before normalising, mean over the chorus tokens"""


@torch.inference_mode()
def chorus_attention(model: CremModel, batch: Batch) -> Tensor:
    """Attention weights of the chorus tokens over all keys: float32 [B, L, H, K, T], every row summing to one.

    Args:
        batch: one sequence per row, as ``Collator.pad`` makes them; each ends with its chorus tokens.
    """
    assert not batch.packed, "maps need one sequence per row"
    chorus_BK = (batch.segments == Segment.U).nonzero()[:, 1].view(-1, batch.chorus_tokens)
    with _recording(model, chorus_BK) as layers:
        model.encode(batch)
    return torch.stack(layers, dim=1)


def image_maps(
    model: CremModel, batch: Batch, attention_BLHKT: Tensor, *, layers: Sequence[int] | None = None
) -> list[ImageMaps]:
    """The maps over the vision tokens of every item of ``batch``, mean over heads and over ``layers`` (all where None).

    Items have one image each; the tokens around it (``<|vision_start|>`` …) do not count.
    """
    chosen = attention_BLHKT if layers is None else attention_BLHKT[:, list(layers)]
    is_image_BT = batch.input_ids == model.core.config.image_token_id
    out = []
    for mean_KT, is_image_T in zip(chosen.mean(dim=(1, 2)), is_image_BT, strict=True):
        weights_Kn = mean_KT[:, is_image_T]
        assert weights_Kn.shape[1], "an item without an image has no map"
        mass_K = weights_Kn.sum(1, keepdim=True)
        out.append(ImageMaps(weights_Kn / mass_K, float(mass_K.mean())))
    return out


def coverage(maps_Kn: Tensor) -> float:
    """Effective share of the image that the maps cover together; between 1 / n and 1."""
    mean_n = maps_Kn.double().mean(0)
    return float(torch.special.entr(mean_n).sum().exp()) / mean_n.shape[0]


def overlap(maps_Kn: Tensor) -> float | None:
    """Mean pairwise cosine of the maps, between 0 and 1; None for a single one."""
    count = maps_Kn.shape[0]
    if count == 1:
        return None
    unit_Kn = F.normalize(maps_Kn.double(), dim=1)
    return float(((unit_Kn @ unit_Kn.T).sum() - count) / (count * (count - 1)))


@contextmanager
def _recording(model: CremModel, queries_BK: Tensor) -> Iterator[list[Tensor]]:
    """Inside the context, every layer of the language model appends the weights of the chosen queries, [B, H, K, T]."""
    layers: list[Tensor] = []
    modules: list[Any] = [m for m in model.core.model.language_model.modules() if hasattr(m, "config")]
    configs = {id(m.config): m.config for m in modules}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = _RECORDING
            config.crem_record = (layers, queries_BK)
        yield layers
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
            del config.crem_record


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: sdpa, which also records the weights of the chosen queries."""
    config: Any = module.config
    layers, queries_BK = config.crem_record
    layers.append(_weights(query, key, attention_mask, queries_BK, kwargs["scaling"]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[return-value]


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, queries_BK: Tensor, scaling: float) -> Tensor:
    """Softmax weights [B, H, K, T] of the queries at ``queries_BK`` over all keys that they see."""
    heads, keys = query.shape[1], key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    index = queries_BK[:, None, :, None].expand(-1, heads, -1, query.shape[3])
    scores_BHKT = (query.gather(2, index).float() @ key.float().transpose(2, 3)) * scaling
    visible_BKT = torch.arange(keys, device=key.device) <= queries_BK[:, :, None]
    if mask is not None:
        rows = mask[:, 0].expand(len(queries_BK), -1, -1)
        visible_BKT = rows.gather(1, queries_BK[:, :, None].expand(-1, -1, keys))
    return scores_BHKT.masked_fill(~visible_BKT[:, None], float("-inf")).softmax(-1)


AttentionInterface.register(_RECORDING, _attention)
AttentionMaskInterface.register(_RECORDING, sdpa_mask)
