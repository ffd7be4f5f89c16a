"""Arrow schemas of every table that passes between jobs, and the identifiers in them.

Identifiers come from content, not from position: the id of a row is the hash of its source and key, that of an image
the hash of its stored bytes. A corpus prepared twice, or in another order, has the same ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import pyarrow as pa

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
    model: str
    """Folder, URI or name of the checkpoint."""
    chorus_tokens: int | None = None
    """The number in use; ``None`` in files from before nested checkpoints."""

    @classmethod
    def of(cls, found: pa.Schema) -> EmbeddingStamp | None:
        """The stamp of an embedding file's schema, or ``None`` where it has no valid one."""
        try:
            return cls(**json.loads((found.metadata or {})[_STAMP_KEY]))
        except (KeyError, TypeError, ValueError):
            return None


def embeddings(stamp: EmbeddingStamp) -> pa.Schema:
    """Schema of an embedding file.

    ``embedding`` is a plain fixed-size list of float32, which is what vector stores read: of unit length, or null
    beside an ``error``.
    """
    return pa.schema(
        [
            ("id", pa.int64()),
            ("embedding", pa.list_(pa.float32(), stamp.dim)),
            ("error", pa.string()),
            ("uri", pa.string()),
            ("text", pa.string()),
        ],
        metadata={_STAMP_KEY: json.dumps(asdict(stamp))},
    )


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
