"""Which files the rows of an output are of, and what differs between two inputs.

A run keeps the files of its input as a table beside its output: name, size, version, and which rows are theirs. The
next input is compared with it by joins, so that nothing is held for each row, and 100 bytes for each file.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.corpus.work_plan import WorkPlan, read_pieces
from pipelines.sources.source_files import FILES, SourceFiles
from pipelines.tables.storage import Folder

__all__ = [
    "INPUT",
    "INPUT_FILES",
    "PRESENT",
    "Difference",
    "compare",
    "read_input_files",
    "write_input_files",
    "write_table",
]

INPUT = "input"
"""Folder of an output for the tables of its input."""
INPUT_FILES = f"{INPUT}/files.parquet"
"""In an output: the files of its input."""
PRESENT = pa.schema([*FILES, ("generation", pa.int64()), ("first", pa.int64()), ("rows", pa.int64())])
"""One row a file: its rows are ``first`` to ``first + rows - 1`` of a generation."""
_IDENTITY = ["name", "size", "version", "container"]


@dataclass(frozen=True)
class Difference:
    """Between the files whose rows an output has, and those of an input."""

    new: pa.Table
    """``FILES``: new or changed; in the order of names"""
    kept: pa.Table
    """``PRESENT``"""
    gone: pa.Table
    """``PRESENT``: gone or changed, so that their rows count no more"""

    @property
    def changed(self) -> int:
        """Files that are in both, and differ."""
        return int(pc.sum(pc.is_in(self.new["name"], self.gone["name"].combine_chunks())).as_py() or 0)


def compare(before: pa.Table, now: pa.Table) -> Difference:
    """What differs between ``PRESENT`` files and those of an input (``FILES``)."""
    kept = before.join(now.select(_IDENTITY), _IDENTITY, join_type="left semi")
    gone = before.join(now.select(_IDENTITY), _IDENTITY, join_type="left anti")
    new = now.join(before.select(_IDENTITY), _IDENTITY, join_type="left anti")
    by_name = [("name", "ascending")]
    return Difference(
        new.select(FILES.names).cast(FILES).sort_by(by_name).combine_chunks(),
        kept.select(PRESENT.names).cast(PRESENT).sort_by(by_name),
        gone.select(PRESENT.names).cast(PRESENT).sort_by(by_name),
    )


def write_input_files(output: Folder, files: SourceFiles, work: Folder, plan: WorkPlan) -> None:
    """Write which rows of a run are of which file, from its plan."""
    counts: Counter[str] = Counter()
    for piece in read_pieces(work, plan):
        for part in piece.ranges:
            counts[part.file] += part.rows
    rows = np.array([counts[name] for name in files.table["name"].to_pylist()], np.int64)
    first = np.cumsum(rows) - rows
    columns = [files.table[name] for name in FILES.names]
    table = pa.table([*columns, pa.array(np.zeros(len(rows), np.int64)), first, rows], schema=PRESENT)
    write_table(output, table, INPUT_FILES)


def read_input_files(output: Folder, name: str = INPUT_FILES, *, generation: int | None = None) -> pa.Table | None:
    """A table of ``PRESENT``; ``None`` where there is none.

    Args:
        generation: to set in each row.
    """
    if not output.exists(name):
        return None
    table = pq.read_table(pa.BufferReader(output.read_bytes(name)), schema=PRESENT)
    if generation is None:
        return table
    place = PRESENT.get_field_index("generation")
    return table.set_column(place, "generation", pa.array(np.full(len(table), generation, np.int64)))


def write_table(output: Folder, table: pa.Table, name: str) -> None:
    """Write a table as Parquet, in one piece."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    output.write_bytes(sink.getvalue().to_pybytes(), name)
