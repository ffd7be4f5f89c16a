"""The tables that this room writes: which rows to leave out and why, and clusters of duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = [
    "CLUSTERS",
    "CLUSTERS_FOLDER",
    "DECISIONS",
    "DUPLICATES",
    "MOST_CLUSTERS",
    "Decisions",
    "duplicates_file",
    "filtered_file",
    "read_clusters",
    "read_decisions",
    "write_table",
]

DECISIONS = pa.schema(
    [
        ("id", pa.int64()),
        ("stage", pa.string()),  # language, contamination or duplicates
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("cluster", pa.int64()),  # id of the row that is kept; null: of no cluster
    ]
)
"""Rows to leave out, in files for each part of the rows that has some. Stage, reason and detail are those of
``schema.REJECTED``."""
DUPLICATES = "duplicates"
"""Folder of the files of duplicates."""

CLUSTERS = pa.schema(
    [
        ("kind", pa.string()),  # rows or images
        ("cluster", pa.int64()),  # id of the row that is kept; of images, the smallest id
        ("size", pa.int64()),
        ("reason", pa.string()),  # exact_duplicate where all are equal, else near_duplicate
        ("left_out", pa.int64()),  # rows of it that are left out; 0 where duplicates are only reported
        ("ids", pa.list_(pa.int64())),  # the first EXAMPLES of them, in the order of the corpus
        ("names", pa.list_(pa.string())),  # source/key of each; empty for images
    ]
)
CLUSTERS_FOLDER = "clusters"
"""Folder of the files of clusters."""
MOST_CLUSTERS = 1000
"""Clusters of each kind that a file has at most, the largest; as many are published."""
_FILES_AT_ONCE = 64


@dataclass(frozen=True)
class Decisions:
    """What ``decide`` found; the rows themselves stand in files."""

    folder: Folder
    """Files of ``DECISIONS``, and ``clusters/`` with files of ``CLUSTERS``."""
    found: dict[str, int]
    """Rows by ``<stage>/<reason>``, whether they are left out or not."""
    left_out: dict[str, int]
    """Rows to leave out by ``<stage>/<reason>``."""
    clusters: int
    """Clusters of rows."""
    unchecked: int
    """Images and texts that were not compared with all others: see ``NearItems``."""


def filtered_file(part: int) -> str:
    """Name of the decisions on the rows of a part by themselves: their language, an evaluation set."""
    return f"filtered-{part:06d}.parquet"


def duplicates_file(part: int, shuffle: int) -> str:
    """Name of the decisions on the rows of a part that a shuffle found to repeat another one."""
    return f"{DUPLICATES}/{part:06d}/{shuffle:06d}.parquet"


def read_decisions(folder: Folder, parts: Iterable[int]) -> pa.Table:
    """The decisions on the rows of some parts, as ``DECISIONS``."""
    names = []
    for part in parts:
        of_part = f"{DUPLICATES}/{part:06d}"
        names += [f"{of_part}/{name}" for name in folder.child(of_part).files(".parquet")] + [filtered_file(part)]
    return pa.concat_tables([DECISIONS.empty_table(), *(_read(folder, name, DECISIONS) for name in names)])


def read_clusters(decisions: Folder, largest: int = MOST_CLUSTERS) -> pa.Table:
    """The largest clusters of each kind, largest first."""
    clusters = decisions.child(CLUSTERS_FOLDER)
    names = clusters.files(".parquet")
    kept = CLUSTERS.empty_table()
    for at in range(0, len(names), _FILES_AT_ONCE):
        read = in_threads(lambda name: _read(clusters, name, CLUSTERS), names[at : at + _FILES_AT_ONCE])
        kept = pa.concat_tables([kept, *read])
        kept = kept.sort_by([("kind", "descending"), ("size", "descending"), ("cluster", "ascending")])
        of_kind = [kept.filter(pc.equal(kept["kind"], kind)) for kind in ("rows", "images")]
        kept = pa.concat_tables([table.slice(0, largest) for table in of_kind])
    return kept


def write_table(rows: Sequence[dict[str, Any]], schema: pa.Schema, folder: Folder, name: str) -> None:
    """Write a file in one piece; nothing where there are no rows."""
    if not rows:
        return
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    require_storage(f"writing {folder.uri}/{name}", lambda: folder.write_bytes(data, name))


def _read(folder: Folder, name: str, schema: pa.Schema) -> pa.Table:
    def read() -> pa.Table:
        if not folder.exists(name):
            return schema.empty_table()
        with folder.open(name) as file:
            return pq.ParquetFile(file).read()

    return require_storage(f"reading {folder.uri}/{name}", read)
