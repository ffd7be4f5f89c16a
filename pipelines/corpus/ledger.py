"""What one piece staged: a file of identifiers and counts, written last and in one piece.

Its presence means that the piece is done: a run that continues leaves it alone. The staged files of an attempt have a
name of their own, and the ledger names the attempt, so the files of a task that died, or ran twice, are of no account.

The files of a group of pieces are in folders of their own, so that no folder grows with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.corpus.work_plan import GROUP_PIECES, WorkPlan
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder

__all__ = ["PieceLedger", "ledger_file", "read_ledgers", "staged_file", "staged_pieces"]

_IDS, _POSITIONS = pa.list_(pa.int64()), pa.list_(pa.int32())


@dataclass(frozen=True)
class PieceLedger:
    """The ledger of one piece."""

    piece: int
    attempt: str
    """Part of the names of its staged files."""
    records: int
    rows_in: int
    """Rows of the records: at least one each."""
    rejected: int
    row_ids: NDArray[np.int64]
    """[rows] ids of the staged rows, in their order."""
    image_ids: NDArray[np.int64]
    """[images] ids of the staged images, in their order."""
    image_bytes: NDArray[np.int64]
    """[images]"""
    shrunk_from: NDArray[np.int64]
    """[images] area in pixels of the source of a shrunk image, 0 of one that was stored at its size."""
    ref_rows: NDArray[np.int64]
    """[references] position in ``row_ids`` of the row that refers to an image."""
    ref_images: NDArray[np.int64]
    """[references] id of that image."""
    row_files: NDArray[np.int64]
    """[files] rows of each staged file of rows."""
    row_bytes: int
    """Size of the staged files of rows."""
    image_files: NDArray[np.int64]
    """[files] images of each staged file of images."""
    rejected_files: NDArray[np.int64]
    """[files] rows of each staged file of rejections."""
    unknown_columns: str
    """JSON: cells by the name of a column that is not read."""
    truncated: NDArray[np.int64]
    """[images] 1 of an image whose file lacks its end (``model.image.allow_truncated``), else 0."""

    def write(self, work: Folder) -> None:
        """Write the ledger into the work folder."""
        sink = pa.BufferOutputStream()
        values = {name: [getattr(self, name)] for name in _LEDGER.names}
        with pa.ipc.new_file(sink, _LEDGER) as file:  # hashes do not compress, and Parquet takes far longer to read
            file.write_table(pa.table(values, schema=_LEDGER))
        work.write_bytes(sink.getvalue().to_pybytes(), ledger_file(self.piece))

    @classmethod
    def read(cls, work: Folder, piece: int) -> PieceLedger:
        """The ledger of a piece that is done."""
        table = pa.ipc.open_file(pa.BufferReader(work.read_bytes(ledger_file(piece)))).read_all()
        values: dict[str, Any] = {}
        for name in _LEDGER.names:
            column = table.column(name).combine_chunks()
            is_list = pa.types.is_list(column.type)
            values[name] = column.flatten().to_numpy().astype(np.int64) if is_list else column[0].as_py()
        return cls(**values)


_LEDGER = pa.schema(
    [
        ("piece", pa.int64()),
        ("attempt", pa.string()),
        ("records", pa.int64()),
        ("rows_in", pa.int64()),
        ("rejected", pa.int64()),
        ("row_ids", _IDS),
        ("image_ids", _IDS),
        ("image_bytes", _POSITIONS),
        ("shrunk_from", _IDS),
        ("ref_rows", _POSITIONS),
        ("ref_images", _IDS),
        ("row_files", _POSITIONS),
        ("row_bytes", pa.int64()),
        ("image_files", _POSITIONS),
        ("rejected_files", _POSITIONS),
        ("unknown_columns", pa.string()),
        ("truncated", _POSITIONS),
    ]
)


def ledger_file(piece: int) -> str:
    """Name of a ledger, from the work folder."""
    return f"{_ledgers(piece // GROUP_PIECES)}/{piece:09d}.arrow"


def _ledgers(group: int) -> str:
    return f"ledgers/{group:06d}"


def staged_file(table: str, piece: int, attempt: str, number: int) -> str:
    """Name of a staged file of ``table`` (``rows``, ``images`` or ``rejected``), from the work folder."""
    return f"staged/{piece // GROUP_PIECES:06d}/{piece:09d}-{attempt}-{table}-{number:04d}.arrow"


def staged_pieces(work: Folder, plan: WorkPlan) -> NDArray[np.int64]:
    """Numbers of the pieces that are done, in order."""
    if not work.exists("ledgers"):
        return np.empty(0, np.int64)
    names = in_threads(lambda group: work.child(_ledgers(group)).files(".arrow"), range(plan.groups))
    return np.array([int(name.partition(".")[0]) for of_group in names for name in of_group], np.int64)


def read_ledgers(work: Folder, pieces: Iterable[int]) -> list[PieceLedger]:
    """The ledgers of some pieces, in their order."""
    return in_threads(lambda piece: PieceLedger.read(work, piece), pieces)
