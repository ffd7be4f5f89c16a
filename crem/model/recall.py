"""From a prefilled context to the memories of its items, and from memories to a context that decoding continues.

Shape suffixes: B sequences; L layers, H key-value heads, K chorus tokens, W head width; 2 is keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from crem.data.prompts import Segment
from crem.errors import CheckpointError
from crem.model.generation import Context
from crem.model.memory import ChorusMemory, MemoryLayout, MemoryType

__all__ = ["memories_of", "recalled", "require_own"]


def memories_of(context: Context, fingerprint: str, dtype: MemoryType) -> list[ChorusMemory]:
    """The memory of every sequence of a context that has its chorus tokens."""
    chorus = context.only(Segment.U)
    layers = [torch.stack([layer.keys, layer.values], dim=1) for layer in chorus.cache.layers]
    stored_BL2HKW = torch.stack(layers, dim=1)
    _, count, _, heads, tokens, width = stored_BL2HKW.shape
    layout = MemoryLayout(fingerprint, count, heads, tokens, width, dtype)
    rows = _stored(stored_BL2HKW, dtype)
    positions = chorus.next_position_B.tolist()
    return [ChorusMemory(layout, at, row.tobytes()) for at, row in zip(positions, rows, strict=True)]


def require_own(memories: Sequence[ChorusMemory], fingerprint: str) -> None:
    """Refuse memories of another model.

    Raises:
        CheckpointError: with both fingerprints.
    """
    for found in sorted({memory.layout.fingerprint for memory in memories} - {fingerprint}):
        raise CheckpointError(
            f"a memory is of model {found}, and this model is {fingerprint}; answer with the model that made it, at "
            "the same number of chorus tokens"
        )


def recalled(memories: Sequence[ChorusMemory], template: Context | None, *, like: Tensor) -> Context:
    """A context of these items, as ``Context.compressed`` makes it.

    Args:
        template: the template before the sample, one sequence; ``None`` where answers do not see it.
        like: has the dtype and the device of the model's keys and values.
    """
    numbers = np.stack([memory.keys_and_values() for memory in memories])
    stored_BL2HKW = torch.from_numpy(numbers).to(like.device, like.dtype)
    items, _, _, _, tokens, _ = stored_BL2HKW.shape
    segments_BC = torch.full((items, tokens), int(Segment.U), dtype=torch.int8, device=like.device)
    if template is not None:
        segments_BC = torch.cat([template.segments_BC.expand(items, -1), segments_BC], dim=1)
    cache = DynamicCache()
    for number, layer_B2HKW in enumerate(stored_BL2HKW.unbind(1)):
        keys, values = layer_B2HKW.unbind(1)
        if template is not None:
            before = template.cache.layers[number]
            assert before.keys is not None and before.values is not None
            keys = torch.cat([before.keys.expand(items, -1, -1, -1), keys], dim=2)
            values = torch.cat([before.values.expand(items, -1, -1, -1), values], dim=2)
        cache.update(keys, values, number)
    return Context(
        cache=cache,
        visible_BC=torch.ones_like(segments_BC, dtype=torch.bool),
        segments_BC=segments_BC,
        next_position_B=torch.tensor([memory.next_position for memory in memories], device=like.device),
    )


def _stored(values_BL2HKW: Tensor, dtype: MemoryType) -> np.ndarray:
    """The bytes of each memory, uint8 [B, bytes]."""
    flat = values_BL2HKW.float()
    if dtype == "fp32":
        return _bytes(flat)
    if dtype == "bf16":
        return _bytes(flat.to(torch.bfloat16).view(torch.int16))
    keys, values = flat.unbind(2)
    key_scales = (keys.abs().amax(-2, keepdim=True) / 127).half()  # of a channel, over the tokens
    value_scales = (values.abs().amax(-1, keepdim=True) / 127).half()  # of a token, over the channels
    rounded = [_rounded(keys, key_scales), _rounded(values, value_scales)]
    return np.concatenate([_bytes(torch.stack(rounded, dim=2)), _bytes(key_scales), _bytes(value_scales)], axis=1)


def _rounded(numbers: Tensor, scales: Tensor) -> Tensor:
    steps = numbers / scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    return steps.round().clamp(-127, 127).to(torch.int8)


def _bytes(numbers: Tensor) -> np.ndarray:
    return numbers.flatten(1).cpu().numpy().view(np.uint8)
