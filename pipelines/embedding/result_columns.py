"""What the model gives of an item, as columns: the vector, and by setting the chorus states and the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crem.checkpoint import CheckpointInfo
from crem.config import EmbedConfig
from crem.data.sequence import PreparedSequence
from crem.errors import ConfigError
from crem.model.encoding import Encoded
from crem.model.memory import MemoryLayout
from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.vector_types import prefix_of, stored_vectors, vector_fields

__all__ = ["OutputTypes", "ResultColumns"]


@dataclass(frozen=True)
class OutputTypes:
    """The types of an output, by the settings and the model."""

    stamp: EmbeddingStamp
    memory: MemoryLayout | None

    @classmethod
    def of(cls, settings: EmbedConfig, model: CheckpointInfo, place: str) -> OutputTypes:
        """The types that the settings ask for.

        Args:
            place: of the checkpoint.

        Raises:
            ConfigError: the model has no such output.
        """
        dim = model.dim if settings.dims is None else settings.dims
        if dim > model.dim:
            raise ConfigError(f"embed.dims={dim}, and vectors of {place} have {model.dim} dimensions; give fewer")
        vector_fields(settings.vector, dim)
        if settings.memory != "off" and not model.chorus_tokens:
            raise ConfigError(f"{place} has no chorus tokens, so it keeps no memory of an item; leave embed.memory out")
        states_dim = model.dim if settings.states else None
        stamp = EmbeddingStamp(
            model.fingerprint, dim, place, model.chorus_tokens, settings.vector, states_dim, settings.memory
        )
        return cls(stamp, None if settings.memory == "off" else model.memory(settings.memory))


class ResultColumns:
    """Makes the columns that a schema of ``OutputColumns`` has of them."""

    def __init__(self, schema: pa.Schema):
        stamp = EmbeddingStamp.of(schema)
        assert stamp is not None, schema
        self._schema, self._stamp = schema, stamp

    def encode(self, model: Any, sequences: Sequence[PreparedSequence], **batches: Any) -> Encoded:
        """What the columns need of some sequences; ``batches`` as of ``crem.Crem.embed_prepared``."""
        stamp = self._stamp
        if stamp.states_dim is None and stamp.memory == "off":
            return Encoded(model.embed_prepared(sequences, **batches), None, None)
        memory = None if stamp.memory == "off" else stamp.memory
        found: Encoded = model.encode_prepared(sequences, states=stamp.states_dim is not None, memory=memory, **batches)
        return found

    def joined(self, found: Sequence[Encoded]) -> Encoded:
        """What ``encode`` gave of several groups of sequences, as of one."""
        stamp = self._stamp
        vectors = [one.vectors for one in found] or [np.zeros((0, stamp.dim), np.float32)]
        states = [one.states for one in found if one.states is not None]
        if stamp.states_dim is not None and not states:
            states = [np.zeros((0, 1, stamp.states_dim), np.float16)]
        memories = [memory for one in found for memory in one.memories or ()]
        return Encoded(
            np.concatenate(vectors),
            np.concatenate(states) if states else None,
            None if stamp.memory == "off" else memories,
        )

    def columns(self, encoded: Encoded, valid_N: NDArray[np.bool_]) -> dict[str, pa.Array]:
        """The columns of N rows, null in those that are not valid.

        Args:
            encoded: of the valid rows.
        """
        vectors = np.zeros((len(valid_N), self._stamp.dim), np.float32)
        vectors[valid_N] = prefix_of(encoded.vectors, self._stamp.dim)
        columns = stored_vectors(vectors, self._stamp.vector, valid_N)
        if encoded.states is not None:
            columns["states"] = _lists(encoded.states, valid_N)
        if encoded.memories is not None:
            stored = iter(encoded.memories)
            values = [next(stored).to_bytes() if valid else None for valid in valid_N]
            columns["memory"] = pa.array(values, pa.binary())
        return columns


def _lists(states_NKD: NDArray[np.float16], valid_N: NDArray[np.bool_]) -> pa.Array:
    """K vectors in each valid row."""
    count, dim = states_NKD.shape[1:]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(states_NKD.reshape(-1)), dim)
    ends = np.cumsum(valid_N * count)
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32(), mask=np.append(~valid_N, False))
    return pa.ListArray.from_arrays(offsets, vectors)
