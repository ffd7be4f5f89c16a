"""The content of chosen rows: of each part the row groups that hold them, each read once."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.tables import schema
from pipelines.tables.part_reads import in_threads, open_part, read_part
from pipelines.tables.row_index import RowIndex
from pipelines.tables.storage import Folder

__all__ = ["content_of"]

_FOOTER_BYTES = 16 * 2**20
"""Footers that a process keeps, as stored; in memory they take about five times as much. Source: ours."""


def content_of(index: RowIndex) -> pa.Table:
    """``schema.ROWS`` of the rows of an index, in its order.

    Raises:
        ConfigError: a part is missing or damaged. StorageError: storage did not answer.
    """
    order = np.argsort(index.part, kind="stable")
    parts, starts = np.unique(index.part[order], return_index=True)
    chosen = np.split(index.row[order], starts[1:])

    def read(at: int) -> pa.Table:
        name = index.parts[parts[at]]
        return read_part(index.rows, name, lambda: _rows_of_part(index.rows, name, chosen[at]))

    tables = in_threads(read, range(len(parts)))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_tables([schema.ROWS.empty_table(), *tables]).take(pa.array(back))


def _rows_of_part(rows: Folder, name: str, chosen: NDArray[np.int32]) -> pa.Table:
    with open_part(rows, name, whole=False) as file:
        reader = pq.ParquetFile(file, metadata=_FOOTERS.get(f"{rows.uri}/{name}"), pre_buffer=True)
        _FOOTERS.put(f"{rows.uri}/{name}", reader.metadata)
        counts = [reader.metadata.row_group(group).num_rows for group in range(reader.metadata.num_row_groups)]
        starts = np.cumsum([0, *counts])
        if len(chosen) and chosen.max() >= starts[-1]:
            raise ValueError(f"it has {starts[-1]} rows, and row {chosen.max()} is wanted")
        group_of = np.searchsorted(starts, chosen, side="right") - 1
        groups, position = np.unique(group_of, return_inverse=True)
        # parts from before a field was added to items lack it; the cast fills it with nulls
        table = reader.read_row_groups(groups.tolist(), use_threads=False).cast(schema.ROWS)
        first = np.cumsum([0, *(counts[group] for group in groups)])
        return table.take(pa.array(first[position] + chosen - starts[group_of]))


class _Footers:
    """The footers that this process read last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def get(self, part: str) -> pq.FileMetaData | None:
        with self._lock:
            if part in self._kept:
                self._kept.move_to_end(part)
            return self._kept.get(part)

    def put(self, part: str, footer: pq.FileMetaData) -> None:
        with self._lock:
            if part in self._kept:
                return
            self._kept[part] = footer
            self._bytes += footer.serialized_size
            while self._bytes > _FOOTER_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].serialized_size


_FOOTERS = _Footers()
