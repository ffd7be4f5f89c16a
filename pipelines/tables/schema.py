"""Arrow schemas of every table that passes between jobs, and the identifiers in them.

Identifiers come from content, not from position: the id of a row is the hash of its source and key, that of an image
the hash of its stored bytes. A corpus prepared twice, or in another order, has the same ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import pyarrow as pa
from pydantic import JsonValue

from crem.model.memory import MemoryLayout
from pipelines.tables.vector_types import VectorType, vector_fields

__all__ = [
    "IMAGES",
    "IMAGE_ROW_GROUP_BYTES",
    "ITEM",
    "REJECTED",
    "ROWS",
    "ROWS_ROW_GROUP_ROWS",
    "ArrowRow",
    "EmbeddingStamp",
    "content_id",
    "embeddings",
    "row_bytes",
    "row_id",
]

IMAGE_ROW_GROUP_BYTES = 4 * 2**20
"""Encoded images of one row group of the image table. Training reads single images by their places in the file
(``image_parts``), so this only bounds the memory of those who write and scan the table. Source: ours."""
ROWS_ROW_GROUP_ROWS = 256
"""Rows of one row group of the row table. Training reads the row groups that hold the rows of its next steps: in a
large corpus about one for each row. Statistics of texts are copies of texts in the footer, and dictionaries of so few
rows save nothing: without both (``use_dictionary=False, write_statistics=["id"]``) a footer takes 5.5 bytes a row
instead of 9.4 where texts have 280 characters. Source: ``bench_reads --footers 50000``."""

ArrowRow: TypeAlias = dict[str, Any]
"""A row of one of these tables, or a value of ``ITEM``, as PyArrow converts it to and from Python."""

ITEM = pa.struct(
    [
        ("text", pa.string()),
        ("instruction", pa.string()),
        ("images", pa.list_(pa.int64())),
        ("image_at", pa.list_(pa.int32())),
    ]
)
"""One side of a row; ``images`` holds ids of the image table, and ``image_at`` is that of ``crem.data.items.Item``."""

ROWS = pa.schema(
    [
        ("id", pa.int64()),
        ("source", pa.string()),
        ("key", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("query", ITEM),
        ("target", ITEM),  # null: generation data without a retrieval pair
        ("negatives", pa.list_(ITEM)),
        ("question", pa.string()),
        ("answer", pa.string()),
    ]
)

IMAGES = pa.schema(
    [
        ("id", pa.int64()),
        ("bytes", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("uri", pa.string()),  # the name under which it was first found
    ]
)

REJECTED = pa.schema(
    [
        ("id", pa.int64()),
        ("source", pa.string()),
        ("key", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


_STAMP_KEY = b"crem"
_KEY_FROM_CONTENT = re.compile("@[0-9a-f]{16}/")


@dataclass(frozen=True)
class EmbeddingStamp:
    """The model that made the vectors of an embedding file: JSON in the metadata of the file's schema."""

    fingerprint: str
    dim: int
    """Of the vectors, which may be a prefix of the model's."""
    model: str
    """Folder, URI or name of the checkpoint."""
    chorus_tokens: int | None = None
    """The number in use; ``None`` in files from before nested checkpoints."""
    vector: VectorType = "fp32"
    states_dim: int | None = None
    """Length of a chorus state; ``None`` where none are written."""
    memory: Literal["off", "bf16", "int8"] = "off"

    def of_vectors(self, dim: int | None = None) -> EmbeddingStamp:
        """Of vectors of the same model, as float32 and without states and memories."""
        return EmbeddingStamp(self.fingerprint, dim or self.dim, self.model, self.chorus_tokens)

    def types(self) -> dict[str, JsonValue]:
        """What the columns hold, by the names of the settings."""
        return {
            "vector": self.vector,
            "dims": self.dim,
            "states": self.states_dim is not None,
            "memory": self.memory,
        }

    @classmethod
    def of(cls, found: pa.Schema) -> EmbeddingStamp | None:
        """The stamp of an embedding file's schema, or ``None`` where it has no valid one."""
        try:
            return cls(**json.loads((found.metadata or {})[_STAMP_KEY]))
        except (KeyError, TypeError, ValueError):
            return None


def embeddings(stamp: EmbeddingStamp, memory: MemoryLayout | None = None) -> pa.Schema:
    """Schema of an embedding file.

    ``embedding`` is a plain fixed-size list, which is what vector stores read: of unit length, or null beside an
    ``error``. ``states`` is a list of them, which LanceDB takes for a multivector. ``memory`` is as
    ``crem.model.memory`` says, and its layout stands in the metadata.
    """
    states = [] if stamp.states_dim is None else [("states", pa.list_(pa.list_(pa.float16(), stamp.states_dim)))]
    return pa.schema(
        [
            ("id", pa.int64()),
            *vector_fields(stamp.vector, stamp.dim),
            ("error", pa.string()),
            ("uri", pa.string()),
            ("text", pa.string()),
            *states,
            *([] if memory is None else [("memory", pa.binary())]),
        ],
        metadata={_STAMP_KEY: json.dumps(asdict(stamp)).encode(), **(memory.metadata() if memory else {})},
    )


def row_bytes(of: pa.Schema) -> int:
    """Bytes of the vector with its scale, the states and the memory of a row of this schema."""
    stamp = EmbeddingStamp.of(of)
    assert stamp is not None, of
    vector = of.field("embedding").type
    states = (stamp.chorus_tokens or 1) * 2 * (stamp.states_dim or 0)
    memory = MemoryLayout.of(of.metadata).size_bytes if "memory" in of.names else 0
    scale = 4 if "scale" in of.names else 0
    return vector.list_size * vector.value_type.bit_width // 8 + scale + states + memory


def row_id(source: str, key: str) -> int:
    """Id of a row: stable over runs and machines.

    The key of a row that has none comes from the content of its file (``pipelines.sources.records.SourceRow.name``)
    and is enough: the source of such a row may be the name of its folder, which may be renamed.
    """
    if _KEY_FROM_CONTENT.match(key):
        source = ""
    return content_id(f"{source}\0{key}".encode(errors="surrogatepass"))


def content_id(data: bytes | pa.Buffer) -> int:
    """The first 8 bytes of the data's BLAKE2b hash as a signed integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)
