"""Parts of tables, as the passes of this room read them: a piece of a file at a time, in the order of the corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["FoundFiles", "TablePart", "pieces"]


@dataclass(frozen=True)
class FoundFiles:
    """Files of a part and what of them counts, as fields of ``TablePart``."""

    names: tuple[str, ...]
    keep: NDArray[np.bool_] | None


@dataclass(frozen=True)
class TablePart:
    """Files of ``schema.ROWS`` or ``schema.IMAGES``, staged or final, that one task reads."""

    folder: Folder
    names: tuple[str, ...]
    """Paths in ``folder`` of Parquet files, or of Arrow IPC files (``.arrow``), which are read at once."""
    rows: int
    """Number of their rows."""
    keep: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)
    """[rows] which of them count; None for all. Rows that are rejected already, such as those of a repeated id, do not
    count: no other row is a duplicate of them."""
    find: Callable[[], FoundFiles] | None = field(default=None, compare=False, repr=False)
    """Finds ``names`` and ``keep`` in a worker, so that the driver does not hold them."""


def pieces(part: TablePart, columns: list[str]) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
    """The rows of a part that count, by file and row group: their positions in the part, and the table.

    A store that fails for a while is asked again.
    """
    if part.find is not None:
        found = part.find()
        part = replace(part, names=found.names, keep=found.keep)
    start = 0
    for table in _tables(part, columns):
        positions = np.arange(start, start + table.num_rows)
        start += table.num_rows
        if part.keep is not None:
            mask = part.keep[positions]
            positions, table = positions[mask], table.filter(pa.array(mask))
        yield positions, table


def _tables(part: TablePart, columns: list[str]) -> Iterator[pa.Table]:
    for name in part.names:
        what = f"reading {part.folder.uri}/{name}"
        if name.endswith(".arrow"):
            data = require_storage(what, lambda name=name: part.folder.read_bytes(name))  # type: ignore[misc]
            yield pa.ipc.open_file(pa.BufferReader(data)).read_all().select(columns)
            continue
        for group in range(require_storage(what, lambda name=name: _row_groups(part.folder, name))):  # type: ignore[misc]
            yield require_storage(
                what,
                lambda name=name, group=group: _read(part.folder, name, group, columns),  # type: ignore[misc]
            )


def _row_groups(folder: Folder, name: str) -> int:
    with folder.open(name) as file:
        count: int = pq.ParquetFile(file).num_row_groups
        return count


def _read(folder: Folder, name: str, group: int, columns: list[str]) -> pa.Table:
    with folder.open(name) as file:
        return pq.ParquetFile(file).read_row_group(group, columns=columns)
