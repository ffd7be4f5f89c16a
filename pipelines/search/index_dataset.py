"""The Lance dataset of an index, and ``index.json``, which names the version of it that is complete.

    index.json           what the index holds; written last, in one piece: a search reads the version that it names
    parts-<version>.parquet   the parts of embeddings in that version, by name and checksum
    vectors.lance/       the rows: id, embedding, uri, text, what embed.keep and embed's outputs added, and _part
    _work/               fragments of a build that was interrupted

A build writes new versions of the dataset; what a search has open, or opens before the new ``index.json`` is there, is
the version before. LanceDB opens the same folder: ``lancedb.connect(INDEX).open_table("vectors")``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lance
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, JsonValue

from crem.errors import ConfigError
from pipelines.search.embedded_parts import EmbeddedPart
from pipelines.tables.json_file import JsonFile
from pipelines.tables.lance_store import store_options
from pipelines.tables.storage import Folder, JobKind

__all__ = [
    "DATASET",
    "PART_COLUMN",
    "VECTOR_INDEX",
    "WORK",
    "IndexSummary",
    "IndexedPart",
    "dataset_place",
    "open_dataset",
    "read_indexed_parts",
    "remove_indexed_parts",
    "write_indexed_parts",
]

DATASET = "vectors.lance"
WORK = "_work"
PART_COLUMN = "_part"
"""The number of the part that a row came from."""
VECTOR_INDEX = "embedding_idx"

_PARTS = pa.schema(
    [
        ("number", pa.int32()),
        ("name", pa.string()),
        ("checksum", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("indexed", pa.int64()),
    ]
)


class IndexSummary(JsonFile):
    """What an index holds; written last, its presence means complete."""

    FILE: ClassVar[str] = "index.json"

    kind: Literal[JobKind.INDEX] = JobKind.INDEX
    version: int
    """Of the dataset."""
    fingerprint: str
    model: str
    """Folder, URI or name of the checkpoint that made the vectors."""
    chorus_tokens: int | None = None
    """Of ``EmbeddingStamp``."""
    dim: int
    vector: str = "fp32"
    """As ``crem embed`` stored the vectors; the dataset has them as float32."""
    count: int
    """Vectors."""
    skipped: int
    """Rows with an error in place of an embedding."""
    parts: int = 0
    added: int = 0
    """Vectors that the last build added."""
    removed: int = 0
    """Vectors that it removed."""
    index: str
    """``exact``, or the kind of the inverted file."""
    probes: int
    """Cells that a query visits."""
    refine: int = 1
    """Stored vectors that a query compares exactly, in multiples of k."""
    recall_at_10: float | None = None
    """Against exact search, of a sample of the vectors; 1 where the search is exact."""
    full_text: bool = False
    source: str | None = None
    """Where the items came from; their images are read from there."""
    build_s: float = 0.0
    bytes_per_vector: float = 0.0
    """On storage, without the index."""
    index_bytes_per_vector: float = 0.0
    """What a search keeps in memory once it has visited all cells."""
    peak_memory_bytes: int = 0
    """Of the process that built it."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)


@dataclass(frozen=True)
class IndexedPart:
    """A part of embeddings whose rows are in the dataset."""

    number: int
    """As in the column ``PART_COLUMN``."""
    part: EmbeddedPart
    indexed: int
    """Rows with a vector."""


def dataset_place(folder: Folder) -> tuple[str, dict[str, str] | None]:
    """The URI of an index's dataset, and the options of Lance's own store."""
    uri = f"{folder.uri}/{DATASET}"
    return uri, store_options(uri)


def open_dataset(folder: Folder, version: int | None = None) -> Any:
    """The ``lance.LanceDataset`` of an index, the newest version by default.

    Raises:
        ConfigError: it is missing or damaged.
    """
    uri, options = dataset_place(folder)
    try:
        return lance.dataset(uri, version=version, storage_options=options)
    except (ValueError, OSError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the index {folder.uri} is damaged: {detail}; run crem index into it with --fresh"
        ) from error


def write_indexed_parts(folder: Folder, version: int, parts: list[IndexedPart]) -> None:
    """Say which parts are in a version of the dataset."""
    rows = [
        {
            "number": part.number,
            "name": part.part.name,
            "checksum": part.part.checksum,
            "rows": part.part.rows,
            "bytes": part.part.bytes,
            "indexed": part.indexed,
        }
        for part in parts
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, _PARTS), sink, compression="zstd")
    folder.write_bytes(sink.getvalue().to_pybytes(), _parts_file(version))


def read_indexed_parts(folder: Folder, version: int) -> list[IndexedPart]:
    """Which parts are in a version of the dataset.

    Raises:
        ConfigError: the list is missing or damaged.
    """
    name = _parts_file(version)
    try:
        rows = pq.read_table(pa.BufferReader(folder.read_bytes(name))).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"the index {folder.uri} is damaged: {name}: {error}; run crem index into it with --fresh"
        ) from error
    return [
        IndexedPart(
            row["number"], EmbeddedPart(row["name"], row["checksum"], row["rows"], row["bytes"]), row["indexed"]
        )
        for row in rows
    ]


def remove_indexed_parts(folder: Folder, kept: list[int]) -> None:
    """Remove the lists of versions that are gone."""
    names = {_parts_file(version) for version in kept}
    for name in folder.files(".parquet"):
        if name.startswith("parts-") and name not in names:
            folder.remove(name)


def _parts_file(version: int) -> str:
    return f"parts-{version:06d}.parquet"
