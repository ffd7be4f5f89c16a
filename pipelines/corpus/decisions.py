"""Which staged rows and images are left out of the final tables: files of decisions for each group of pieces.

1. ``repeats``: the first row of an id is kept.
2. ``rows``: a row can also be left out by choice (``curation``). Repeated ids and choices make the decisions on rows.
3. ``images``: an image is kept once, in the first piece in which a kept row refers to it. Images that only rows that
   are left out name go with them.

``resolve`` makes them in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus.ledger import PieceLedger
from pipelines.corpus.work_plan import GROUP_PIECES, WorkPlan
from pipelines.tables.storage import Folder

__all__ = [
    "DUPLICATE_ID",
    "LEFT_OUT",
    "LEFT_OUT_IDS",
    "PLACES",
    "GroupDecisions",
    "keep_of_pieces",
    "left_out_rows",
    "wanted_images",
]

DUPLICATE_ID = "duplicate_id"
LEFT_OUT_IDS = pa.schema([("id", pa.int64()), ("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
"""Rows to leave out by choice."""
LEFT_OUT = pa.schema(
    [
        ("piece", pa.int64()),
        ("place", pa.int32()),  # position among the staged rows of the piece
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),  # null of a duplicate: its row says which key it repeats
    ]
)
PLACES = pa.schema([("piece", pa.int64()), ("place", pa.int32())])
"""Rows or images to leave out: their positions in their pieces."""


@dataclass(frozen=True)
class GroupDecisions:
    """What is left out of the pieces of one group."""

    rows: pa.Table
    """``LEFT_OUT``, in the order of pieces and rows."""
    images: pa.Table
    """``PLACES`` of staged images that the final table has from another piece, or does not need; in their order."""

    @classmethod
    def read(cls, work: Folder, group: int) -> GroupDecisions:
        """The decisions on a group."""
        return cls(cls.read_rows(work, group), _read(work, "images", group, PLACES))

    @staticmethod
    def write_repeats(work: Folder, group: int, rows: pa.Table) -> None:
        """Write ``PLACES`` of the rows of a group whose id an earlier row has."""
        _write(work, "repeats", group, rows)

    @staticmethod
    def write_rows(work: Folder, group: int, rows: pa.Table) -> None:
        """Write ``rows`` of a group."""
        _write(work, "rows", group, rows)

    @staticmethod
    def write_images(work: Folder, group: int, images: pa.Table) -> None:
        """Write ``images`` of a group."""
        _write(work, "images", group, images)

    @staticmethod
    def read_repeats(work: Folder, group: int) -> pa.Table:
        """``PLACES`` of the rows whose id an earlier row has."""
        return _read(work, "repeats", group, PLACES)

    @staticmethod
    def read_rows(work: Folder, group: int) -> pa.Table:
        """``rows`` of a group, whose images may be undecided."""
        return _read(work, "rows", group, LEFT_OUT)

    @staticmethod
    def are_made(work: Folder, plan: WorkPlan, step: str) -> bool:
        """Whether the decisions of a step (``repeats``, ``rows`` or ``images``) on every group are there."""
        names = work.child("decisions").files(".parquet")
        return sum(name.startswith(f"{step}-") for name in names) == plan.groups

    @staticmethod
    def kept(left_out: pa.Table, piece: int, size: int) -> NDArray[np.bool_]:
        """[rows or images] of a piece, by a table that begins with the columns of ``PLACES``, in their order."""
        keep = np.ones(size, np.bool_)
        start, stop = np.searchsorted(left_out["piece"].to_numpy(), [piece, piece + 1])
        keep[left_out["place"].slice(start, stop - start).to_numpy()] = False
        return keep

    def keep_rows(self, ledger: PieceLedger) -> NDArray[np.bool_]:
        """[rows] of a piece."""
        return self.kept(self.rows, ledger.piece, len(ledger.row_ids))

    def keep_images(self, ledger: PieceLedger) -> NDArray[np.bool_]:
        """[images] of a piece."""
        return self.kept(self.images, ledger.piece, len(ledger.image_ids))


def keep_of_pieces(work: Folder, ledgers: list[PieceLedger]) -> NDArray[np.bool_]:
    """[rows] of some pieces: whether their id is the first of its kind."""
    repeats: dict[int, pa.Table] = {}
    keep = [np.empty(0, np.bool_)]
    for ledger in ledgers:
        group = ledger.piece // GROUP_PIECES
        if group not in repeats:
            repeats[group] = GroupDecisions.read_repeats(work, group)
        keep.append(GroupDecisions.kept(repeats[group], ledger.piece, len(ledger.row_ids)))
    return np.concatenate(keep)


def left_out_rows(ledgers: list[PieceLedger], repeats: pa.Table, chosen: pa.Table) -> pa.Table:
    """``LEFT_OUT`` of a group of pieces.

    Args:
        repeats: ``PLACES`` of the rows whose id an earlier row has.
        chosen: ``LEFT_OUT_IDS`` of rows of the group; of several reasons for a row the first counts.
    """
    sizes = [len(ledger.row_ids) for ledger in ledgers]
    ids = np.concatenate([np.empty(0, np.int64), *(ledger.row_ids for ledger in ledgers)])
    keep = [GroupDecisions.kept(repeats, ledger.piece, size) for ledger, size in zip(ledgers, sizes, strict=True)]
    first = np.concatenate([np.empty(0, np.bool_), *keep])
    chosen_ids, reasons = np.unique(chosen["id"].to_numpy(), return_index=True)
    by_choice = first & np.isin(ids, chosen_ids)
    at = np.flatnonzero(~first | by_choice)
    is_choice = pa.array(by_choice[at])
    reason = np.zeros(len(at), np.int64)
    reason[by_choice[at]] = reasons[np.searchsorted(chosen_ids, ids[at][by_choice[at]])]
    columns = [
        chosen[name].combine_chunks().take(pa.array(reason, mask=~by_choice[at]))
        for name in ("stage", "reason", "detail")
    ]
    columns[0] = pc.if_else(is_choice, columns[0], pa.scalar("ids"))
    columns[1] = pc.if_else(is_choice, columns[1], pa.scalar(DUPLICATE_ID))
    pieces = np.repeat(np.array([ledger.piece for ledger in ledgers], np.int64), sizes)
    places = np.concatenate([np.empty(0, np.int64), *(np.arange(size) for size in sizes)])
    return pa.table([pieces[at], places[at].astype(np.int32), *columns], schema=LEFT_OUT)


def wanted_images(ledger: PieceLedger, keep_rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[images] of a piece: whether a kept row of the piece refers to it."""
    return np.isin(ledger.image_ids, ledger.ref_images[keep_rows[ledger.ref_rows]])


def _file(step: str, group: int) -> str:
    return f"decisions/{step}-{group:06d}.parquet"


def _write(work: Folder, step: str, group: int, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    work.write_bytes(sink.getvalue().to_pybytes(), _file(step, group))


def _read(work: Folder, step: str, group: int, table: pa.Schema) -> pa.Table:
    return pq.read_table(pa.BufferReader(work.read_bytes(_file(step, group))), schema=table).combine_chunks()
