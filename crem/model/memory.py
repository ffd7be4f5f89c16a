"""The chorus memory: all that compressed generation keeps of an item, to be stored and answered from later.

A memory has the keys and values of the item's K chorus tokens in every layer, and the position that follows them. The
template before the sample is the same for every item and is not in it: the model computes that once. ``crem embed …
embed.memory=bf16`` writes a memory for each item into the column ``memory`` and its layout into the schema's metadata:

    table = pq.read_table("vectors/rows")
    layout = MemoryLayout.of(table.schema.metadata)
    memory = ChorusMemory.from_bytes(layout, table["memory"][0].as_py())
    crem.load("model").answer_memories([memory], ["What is it?"])     # ``embed.chorus_tokens``: load with that number

Bytes of a memory, all little-endian: the next position (int32), then keys and values [L, 2, H, K, W] as float32,
bfloat16 or int8. int8 is symmetric with float16 scales after the values: a key has one for each of its W channels,
shared by the K tokens [L, H, W], and a value one for each token [L, H, K]. Keys have channels that are large in every
token (KIVI, arXiv:2402.02750); ``tests/bench/README.md`` has the errors of this and of other granularities.

Shape suffixes: L layers, H key-value heads, K chorus tokens, W head width; 2 is keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from crem.errors import CheckpointError, ConfigError

__all__ = ["MEMORY_KEY", "ChorusMemory", "MemoryLayout", "MemoryType"]

MemoryType: TypeAlias = Literal["fp32", "bf16", "int8"]
"""How keys and values are stored."""
MEMORY_KEY = b"crem_memory"
"""Key of the layout in the metadata of an Arrow schema."""
_POSITION = np.dtype("<i4")
_SCALE = np.dtype("<f2")
_STORED: dict[MemoryType, np.dtype] = {"fp32": np.dtype("<f4"), "bf16": np.dtype("<u2"), "int8": np.dtype("i1")}


@dataclass(frozen=True)
class MemoryLayout:
    """What the bytes of a model's memories are."""

    fingerprint: str
    """Of the model, which alone can answer from them."""
    layers: int
    kv_heads: int
    chorus_tokens: int
    head_dim: int
    dtype: MemoryType

    @classmethod
    def of(cls, metadata: Mapping[bytes, bytes] | None) -> MemoryLayout:
        """The layout in the metadata of a schema.

        Raises:
            ConfigError: it has none.
        """
        try:
            return cls(**json.loads((metadata or {})[MEMORY_KEY]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("the table has no memories; write them by crem embed … embed.memory=bf16") from error

    def metadata(self) -> dict[bytes, bytes]:
        """For the metadata of a schema."""
        return {MEMORY_KEY: json.dumps(asdict(self)).encode()}

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[L, 2, H, K, W]"""
        return self.layers, 2, self.kv_heads, self.chorus_tokens, self.head_dim

    @property
    def key_scales(self) -> int:
        """Scales of the keys, L H W."""
        return self.layers * self.kv_heads * self.head_dim if self.dtype == "int8" else 0

    @property
    def value_scales(self) -> int:
        """Scales of the values, L H K."""
        return self.layers * self.kv_heads * self.chorus_tokens if self.dtype == "int8" else 0

    @property
    def size_bytes(self) -> int:
        """Of one memory."""
        stored = int(np.prod(self.shape)) * _STORED[self.dtype].itemsize
        return _POSITION.itemsize + stored + (self.key_scales + self.value_scales) * _SCALE.itemsize


@dataclass(frozen=True, eq=False)
class ChorusMemory:
    """The memory of one item; pickles compactly."""

    layout: MemoryLayout
    next_position: int
    """First position after the chorus tokens, the same on the three axes."""
    data: bytes
    """Keys, values and scales, as stored."""

    @classmethod
    def from_bytes(cls, layout: MemoryLayout, stored: bytes) -> ChorusMemory:
        """A memory as ``to_bytes`` gave it.

        Raises:
            CheckpointError: the bytes are not of this layout.
        """
        if len(stored) != layout.size_bytes:
            raise CheckpointError(
                f"a memory of {len(stored)} bytes, and one of {layout} has {layout.size_bytes}; read the layout from "
                "the table that holds the memory"
            )
        start = _POSITION.itemsize
        return cls(layout, int(np.frombuffer(stored, _POSITION, 1)[0]), stored[start:])

    def to_bytes(self) -> bytes:
        """The memory in one piece, ``layout.size_bytes`` long."""
        return np.array(self.next_position, _POSITION).tobytes() + self.data

    def keys_and_values(self) -> NDArray[np.float32]:
        """float32 [L, 2, H, K, W]"""
        layout, shape = self.layout, self.layout.shape
        stored = np.frombuffer(self.data, _STORED[layout.dtype], int(np.prod(shape))).reshape(shape)
        if layout.dtype == "bf16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        values: NDArray[np.float32] = stored.astype(np.float32)
        if layout.dtype == "int8":
            scales = np.frombuffer(self.data, _SCALE, offset=stored.nbytes).astype(np.float32)
            keys, of_values = np.split(scales, [layout.key_scales])
            layers, _, heads, tokens, width = shape
            values[:, 0] *= keys.reshape(layers, heads, 1, width)
            values[:, 1] *= of_values.reshape(layers, heads, tokens, 1)
        return values
