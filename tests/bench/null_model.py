"""A model that costs nothing: its tokens are a hash of the item, its vectors a hash of the tokens.

With it a job shows what is not the model. The checkpoint is real, with its fingerprint and dimension; the forward is
left out, and with ``NullCollator`` the tokenizer too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from crem.checkpoint import describe
from crem.config import ImageConfig
from crem.data.items import Item
from crem.data.prompts import Prompt, Segment
from crem.data.sequence import PreparedSequence

__all__ = ["NullCollator", "NullModel", "load_null_model"]

_TOKENS = 8
_SEGMENTS = np.full(_TOKENS, Segment.T, np.int8)
_POSITIONS = np.tile(np.arange(_TOKENS), (3, 1))
_NO_PATCHES = np.empty((0, 3, 1), np.uint8)


class NullCollator:
    """Stands where a task has the ``Collator`` of the model; for texts."""

    def __init__(self, model: str):
        del model
        self.limits = ImageConfig()

    def prepare(self, item: Item, *, chorus_tokens: int | None = None) -> PreparedSequence:
        """Eight tokens."""
        del chorus_tokens
        assert item.text and not item.images, item
        digest = hashlib.blake2b(item.text.encode(), digest_size=4 * _TOKENS).digest()
        prompt = Prompt(np.frombuffer(digest, np.int32).astype(np.int64) & 0xFFFF, _SEGMENTS, 0, _TOKENS)
        return PreparedSequence(prompt, _POSITIONS, _NO_PATCHES, ())


@dataclass
class NullModel:
    """Stands where an actor has ``crem.Crem``."""

    fingerprint: str
    dim: int
    device: ClassVar = torch.device("cpu")

    def embed_prepared(self, sequences: Sequence[PreparedSequence], **_: object) -> NDArray[np.float32]:
        """Unit vectors [N, D]; of the same tokens and pixels the same vector."""
        digests = b"".join(_digest(sequence) for sequence in sequences)
        seeds_N = np.frombuffer(digests, np.uint64)
        odd_D = np.arange(1, 2 * self.dim, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        values_ND = ((seeds_N[:, None] * odd_D) >> np.uint64(40)).astype(np.float32) / 2**23 - 1
        unit_ND: NDArray[np.float32] = values_ND / np.linalg.norm(values_ND, axis=1, keepdims=True)
        return unit_ND


def load_null_model(model: str, threads: int, chorus_tokens: int | None = None) -> NullModel:
    """In place of ``pipelines.tables.models.load_model``."""
    del threads
    description = describe(model, chorus_tokens)
    return NullModel(description.fingerprint, description.dim)


def _digest(sequence: PreparedSequence) -> bytes:
    content = hashlib.blake2b(sequence.prompt.input_ids, digest_size=8)
    content.update(sequence.patches_PCN)
    return content.digest()
