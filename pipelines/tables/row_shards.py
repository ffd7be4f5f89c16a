"""The rows of prepared tables in pieces of some hundred or thousand: the units of work of jobs over rows."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from crem.errors import ConfigError
from pipelines.tables import schema
from pipelines.tables.manifest import table_parts
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["RowShard", "read_row_shard", "row_shards"]


@dataclass(frozen=True)
class RowShard:
    """Rows that one worker takes at a time, and that become one part of a new version."""

    number: int
    part: str
    """File of the row table."""
    first: int
    """Position of its first row there."""
    rows: int

    @property
    def name(self) -> str:
        """File name of the part of the new version."""
        return f"part-{self.number:06d}.parquet"


def row_shards(prepared: Folder, rows_per_shard: int) -> list[RowShard]:
    """The rows of every part, in pieces that do not cross parts.

    Raises:
        ConfigError: there are no rows.
    """
    found: list[RowShard] = []
    for name in table_parts(prepared, "rows"):
        with prepared.open("rows", name) as file:
            count = pq.ParquetFile(file).metadata.num_rows
        for first in range(0, count, rows_per_shard):
            found.append(RowShard(len(found), name, first, min(rows_per_shard, count - first)))
    if not found:
        raise ConfigError(f"{prepared.uri} has no rows; prepare a corpus that has some")
    return found


def read_row_shard(prepared: Folder, shard: RowShard) -> pa.Table:
    """The rows of a shard, ``schema.ROWS``."""

    def read() -> pa.Table:
        with prepared.open("rows", shard.part) as file:
            parquet_file = pq.ParquetFile(file)
            start, found = 0, []
            for group in range(parquet_file.num_row_groups):
                count = parquet_file.metadata.row_group(group).num_rows
                begin, end = max(shard.first - start, 0), min(shard.first + shard.rows - start, count)
                if begin < end:
                    piece = parquet_file.read_row_group(group, columns=schema.ROWS.names)
                    found.append(piece.slice(begin, end - begin))
                start += count
        return pa.concat_tables(found).cast(schema.ROWS)

    return require_storage(f"reading {prepared.uri}/rows/{shard.part}", read)
