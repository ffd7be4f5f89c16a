"""The parts of an embedding output, read: Parquet files, or the data files of a Lance dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.storage import Folder
from pipelines.tables.vector_types import vector_columns

__all__ = ["PartFooter", "part_footer", "read_part"]


class PartFooter(NamedTuple):
    """What a part says of itself."""

    schema: pa.Schema
    rows: int

    @property
    def stamp(self) -> EmbeddingStamp | None:
        """``None`` where crem embed did not write it."""
        return EmbeddingStamp.of(self.schema)


def part_footer(folder: Folder, name: str) -> PartFooter:
    """Schema and rows of a part, without its rows.

    Raises:
        pyarrow.ArrowException or OSError: it is missing or damaged.
    """
    with folder.open(name) as file:
        parquet = pq.ParquetFile(file)
        return PartFooter(parquet.schema_arrow, parquet.metadata.num_rows)


def read_part(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a part, all where ``None``; with ``embedding`` those that ``vector_types.unit_vectors`` needs.

    Raises:
        pyarrow.ArrowException or OSError: it is missing or damaged.
    """
    with folder.open(name) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        if columns is None:
            return parquet.read()
        needed = vector_columns(parquet.schema_arrow.names) if "embedding" in columns else []
        return parquet.read(columns=list(dict.fromkeys([*columns, *needed])))
