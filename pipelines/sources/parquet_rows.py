"""Rows of Parquet files: split at row groups, and within large groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from crem.errors import ConfigError
from pipelines.sources.records import ParsedRow, RowRange, unreadable_file
from pipelines.tables.storage import Folder

__all__ = ["read_parquet", "split_parquet"]

_RESPLIT_BYTES = 64 * 2**20
"""A row group is split into several ranges only below this size, since each range reads the group again."""
_READ_ROWS = 64
"""Rows turned into Python objects at a time; they may carry inline images."""


def split_parquet(file: IO[bytes], folder: str, name: str, columns: Sequence[str], rows: int) -> list[RowRange]:
    """Ranges of about ``rows`` rows.

    Raises:
        ConfigError: the file has none of ``columns``.
    """
    parquet = pq.ParquetFile(file)
    present = parquet.schema_arrow.names
    if not set(present) & set(columns):
        raise ConfigError(f"{folder}/{name} has the columns {present}; none of them is known here: {list(columns)}")
    ranges: list[RowRange] = []
    groups: list[int] = []
    first = collected = 0
    for index in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(index)
        if groups and collected + group.num_rows > rows:
            ranges.append(RowRange(folder, name, first, collected, tuple(groups)))
            first, collected, groups = first + collected, 0, []
        if group.num_rows > rows and group.total_byte_size <= _RESPLIT_BYTES:
            for start in range(0, group.num_rows, rows):
                size = min(rows, group.num_rows - start)
                ranges.append(RowRange(folder, name, first + start, size, (index,), skip=start))
            first += group.num_rows
        elif group.num_rows:
            groups.append(index)
            collected += group.num_rows
    if groups:
        ranges.append(RowRange(folder, name, first, collected, tuple(groups)))
    return ranges


def read_parquet(rows: RowRange, columns: Sequence[str]) -> Iterator[ParsedRow]:
    """The rows of a range in order, with those of ``columns`` that the file has.

    Raises:
        ConfigError: the file cannot be read.
    """
    skip, left = rows.skip, rows.rows
    try:
        with Folder(rows.folder).open(rows.file) as handle:
            file = pq.ParquetFile(handle)
            wanted = [c for c in file.schema_arrow.names if c in columns]
            for batch in file.iter_batches(_READ_ROWS, row_groups=list(rows.row_groups), columns=wanted):
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                batch = batch.slice(skip, left)
                skip, left = 0, left - batch.num_rows
                yield from _parse(batch)
                if left == 0:
                    return
    except (pa.ArrowException, OSError) as error:
        raise unreadable_file(rows.folder, rows.file, error) from error


def _parse(batch: pa.RecordBatch) -> Iterator[ParsedRow]:
    try:
        yield from [(row, "") for row in batch.to_pylist()]
    except (ValueError, OverflowError, pa.ArrowException):  # e.g. text that is not UTF-8: find the rows at fault
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0], ""
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield None, f"{type(error).__name__}: {error}"
