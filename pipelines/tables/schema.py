"""Arrow schemas of every table that passes between jobs, and the identifiers in them.

Identifiers are content, not position: a row is the hash of its source and source key, an image is the hash of its
stored bytes, so that a corpus prepared twice, or in another order, has the same ones.
"""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa

__all__ = ["IMAGES", "ITEM", "REJECTED", "ROWS", "content_id", "embeddings", "row_id"]

ITEM = pa.struct(
    [
        ("text", pa.string()),
        ("instruction", pa.string()),
        ("images", pa.list_(pa.int64())),
    ]
)
"""One side of a row; ``images`` are ids in the image table."""

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
        ("uri", pa.string()),  # the first name that it was found under
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


def embeddings(dim: int, *, fingerprint: str, model: str, chorus_tokens: int | None = None) -> pa.Schema:
    """Schema of an embedding file; its metadata names the model that made the vectors, and with how many chorus tokens.

    ``embedding`` is a plain fixed-size list of float32 (unit length, or null beside an ``error``), which is what
    vector stores read.
    """
    stamp = {"fingerprint": fingerprint, "dim": dim, "model": model, "chorus_tokens": chorus_tokens}
    return pa.schema(
        [
            ("id", pa.int64()),
            ("embedding", pa.list_(pa.float32(), dim)),
            ("error", pa.string()),
            ("uri", pa.string()),
            ("text", pa.string()),
        ],
        metadata={"crem": json.dumps(stamp)},
    )


def row_id(source: str, key: str) -> int:
    """Id of a row: stable over runs and machines."""
    return content_id(f"{source}\0{key}".encode(errors="surrogatepass"))


def content_id(data: bytes) -> int:
    """The first 8 bytes of the data's BLAKE2b hash as a signed integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)
