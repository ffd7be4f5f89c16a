"""What the forwards of some prepared sequences give: vectors, and where asked the chorus states and the memories.

Sequences of similar length share a forward, so that there is little padding among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from crem.data.collator import Collator
from crem.data.sequence import PreparedSequence
from crem.errors import ConfigError
from crem.model.chorus import chorus_states, embedding_of
from crem.model.crem import CremModel
from crem.model.generation import prefill
from crem.model.memory import ChorusMemory, MemoryType
from crem.model.recall import memories_of

__all__ = ["Encoded", "batches_by_length", "default_batch_tokens", "encode"]


@dataclass(frozen=True)
class Encoded:
    """What one forward gives of some items, in their order."""

    vectors: NDArray[np.float32]
    """[N, D], each of unit length"""
    states: NDArray[np.float16] | None
    """[N, K, D]: the states of the chorus tokens, each of unit length, whose late interaction (MaxSim) is finer"""
    memories: list[ChorusMemory] | None


@torch.inference_mode()
def encode(
    model: CremModel,
    collator: Collator,
    sequences: Sequence[PreparedSequence],
    *,
    fingerprint: str,
    batch_size: int,
    batch_tokens: int | None,
    states: bool,
    memory: MemoryType | None,
    before_batch: Callable[[int], None] | None,
) -> Encoded:
    """Run the model on sequences; arguments as of ``crem.Crem.encode_prepared``."""
    if memory is not None and not model.config.chorus_tokens:
        raise ConfigError("this model has no chorus tokens, so it keeps no memory of an item")
    count = sequences[0].chorus_tokens if sequences else 0
    dim = int(model.core.config.text_config.hidden_size)
    vectors_ND = np.zeros((len(sequences), dim), dtype=np.float32)
    states_NKD = np.zeros((len(sequences), count, dim), dtype=np.float16) if states else None
    memories: dict[int, ChorusMemory] = {}
    on_gpu = model.device.type == "cuda"  # which computes a batch while the next one is padded and sent
    pending: tuple[list[int], Tensor] | None = None
    batch_tokens = batch_tokens or default_batch_tokens(model.device)
    for rows in batches_by_length([sequence.tokens for sequence in sequences], batch_size, batch_tokens):
        if before_batch is not None:
            before_batch(len(rows))
        batch = collator.pad([sequences[i] for i in rows], pixels_as_bytes=on_gpu).to(model.device)
        if memory is None:
            hidden_BTD, _ = model.encode(batch)
            states_BKD = chorus_states(hidden_BTD, batch.segments, batch.chorus_tokens)
        else:
            context = prefill(model, batch)
            states_BKD = context.states_BKD
            memories |= zip(rows, memories_of(context, fingerprint, memory), strict=True)
        if pending is not None:
            vectors_ND[pending[0]] = pending[1].cpu().numpy()
        pending = rows, embedding_of(states_BKD)
        if states_NKD is not None:
            states_NKD[rows] = F.normalize(states_BKD.float(), dim=-1).half().cpu().numpy()
    if pending is not None:
        vectors_ND[pending[0]] = pending[1].cpu().numpy()
    ordered = None if memory is None else [memories[i] for i in range(len(sequences))]
    return Encoded(vectors_ND, states_NKD, ordered)


def default_batch_tokens(device: torch.device) -> int:
    """Most tokens of a forward where nobody says it. Source: ``tests/bench/README.md``."""
    return 4_096 if device.type == "cpu" else 16_384  # a larger batch leaves the caches of a CPU


def batches_by_length(lengths: Sequence[int], most: int, most_tokens: int) -> Iterator[list[int]]:
    """Places of sequences, the shortest first, in batches of at most so many items and padded tokens."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = len(batch) == most or (len(batch) + 1) * lengths[place] > most_tokens
        if batch and full:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
