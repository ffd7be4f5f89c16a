"""Which staged rows and images are left out of the final tables: one file of decisions for each group of pieces.

The first row of an id is kept. An image is kept once, in the first piece in which a kept row refers to it. A row can
also be left out by choice (``pipelines.duplicates``): then the images that only it names go with it.

``resolve_here`` decides with NumPy in the driver, which takes 24 bytes a row and 16 an image reference;
``pipelines.corpus.resolve_shuffle`` decides the same on any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.corpus.ledger import PieceLedger, read_ledgers
from pipelines.corpus.work_plan import WorkPlan
from pipelines.tables.storage import Folder

__all__ = [
    "CHOSEN",
    "DUPLICATE_ID",
    "LEFT_OUT",
    "LEFT_OUT_IDS",
    "GroupDecisions",
    "first_of_each",
    "left_out_rows",
    "read_left_out",
    "resolve_here",
    "wanted_images",
]

DUPLICATE_ID = "duplicate_id"
LEFT_OUT_IDS = pa.schema([("id", pa.int64()), ("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
"""Rows to leave out by choice, with these columns among others in files of ``left_out/`` of the work folder."""
CHOSEN = "left_out"
"""Their folder."""
LEFT_OUT = pa.schema(
    [
        ("piece", pa.int64()),
        ("row", pa.int32()),  # position among the staged rows of the piece
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),  # null of a duplicate: its row says which key it repeats
    ]
)
_DROPPED_IMAGES = pa.schema([("piece", pa.int64()), ("image", pa.int32())])


@dataclass(frozen=True)
class GroupDecisions:
    """What is left out of the pieces of one group."""

    rows: pa.Table
    """``LEFT_OUT``, in the order of pieces and rows."""
    images: pa.Table
    """(piece, image): staged images that the final table has from another piece, or does not need."""

    def write(self, work: Folder, group: int) -> None:
        """Write the decisions into the work folder."""
        self.write_rows(work, group, self.rows)
        self.write_images(work, group, self.images)

    @staticmethod
    def write_rows(work: Folder, group: int, rows: pa.Table) -> None:
        """Write the decisions on the rows of a group."""
        _write(work, "rows", group, rows)

    @staticmethod
    def write_images(work: Folder, group: int, images: pa.Table) -> None:
        """Write those on its images."""
        _write(work, "images", group, images)

    @classmethod
    def read(cls, work: Folder, group: int) -> GroupDecisions:
        """The decisions on a group."""
        return cls(cls.read_rows(work, group), _read(work, "images", group, _DROPPED_IMAGES))

    @staticmethod
    def read_rows(work: Folder, group: int) -> pa.Table:
        """``rows`` of a group, whose images may be undecided."""
        return _read(work, "rows", group, LEFT_OUT)

    @classmethod
    def are_made(cls, work: Folder, plan: WorkPlan) -> bool:
        """Whether the decisions on every group are there."""
        return len(work.child("decisions").files(".parquet")) == 2 * plan.groups

    @staticmethod
    def kept(rows: pa.Table, ledger: PieceLedger) -> NDArray[np.bool_]:
        """[rows] of a piece, by a value of ``rows``."""
        return _without(rows, "row", ledger.piece, len(ledger.row_ids))

    def keep_rows(self, ledger: PieceLedger) -> NDArray[np.bool_]:
        """[rows] of a piece."""
        return self.kept(self.rows, ledger)

    def keep_images(self, ledger: PieceLedger) -> NDArray[np.bool_]:
        """[images] of a piece."""
        return _without(self.images, "image", ledger.piece, len(ledger.image_ids))

    @staticmethod
    def image_table(pieces: NDArray[np.int64], images: NDArray[np.int64]) -> pa.Table:
        """A value of ``images``."""
        return pa.table([pieces, images.astype(np.int32)], schema=_DROPPED_IMAGES)


def _file(name: str, group: int) -> str:
    return f"decisions/{name}-{group:06d}.parquet"


def _write(work: Folder, name: str, group: int, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    work.write_bytes(sink.getvalue().to_pybytes(), _file(name, group))


def _read(work: Folder, name: str, group: int, table: pa.Schema) -> pa.Table:
    return pq.read_table(pa.BufferReader(work.read_bytes(_file(name, group))), schema=table)


def _without(table: pa.Table, column: str, piece: int, size: int) -> NDArray[np.bool_]:
    keep = np.ones(size, np.bool_)
    keep[table.filter(pc.equal(table["piece"], piece))[column].to_numpy()] = False
    return keep


def read_left_out(work: Folder) -> pa.Table:
    """All rows that are left out by choice, as ``LEFT_OUT_IDS``; of several reasons for a row the first."""
    folder = work.child(CHOSEN)
    tables = [pq.read_table(pa.BufferReader(folder.read_bytes(name))) for name in folder.files(".parquet")]
    chosen = [table.select(LEFT_OUT_IDS.names).cast(LEFT_OUT_IDS) for table in tables]
    table = pa.concat_tables([LEFT_OUT_IDS.empty_table(), *chosen]).combine_chunks()
    return table.take(pa.array(np.flatnonzero(first_of_each(table["id"].to_numpy()))))


def resolve_here(work: Folder, plan: WorkPlan) -> None:
    """Decide on all pieces and write the decisions."""
    ledgers = read_ledgers(work, range(plan.pieces))
    for group, decisions in enumerate(decide(ledgers, read_left_out(work), plan)):
        decisions.write(work, group)


def decide(ledgers: list[PieceLedger], left_out: pa.Table, plan: WorkPlan) -> Iterable[GroupDecisions]:
    """The decisions on each group; ``ledgers`` are those of all pieces in order."""
    ids = np.concatenate([np.empty(0, np.int64), *(ledger.row_ids for ledger in ledgers)])
    pieces = np.repeat(np.arange(len(ledgers)), [len(ledger.row_ids) for ledger in ledgers])
    rows = np.concatenate([np.empty(0, np.int64), *(np.arange(len(ledger.row_ids)) for ledger in ledgers)])
    first = first_of_each(ids)
    chosen = first & np.isin(ids, left_out["id"].to_numpy())
    keep = first & ~chosen
    dropped = np.flatnonzero(~keep)
    table = left_out_rows(pieces[dropped], rows[dropped], ids[dropped], chosen[dropped], left_out)

    kept = np.split(keep, np.cumsum([len(ledger.row_ids) for ledger in ledgers])[:-1])
    wanted = np.concatenate(
        [np.empty(0, np.bool_), *(wanted_images(ledger, k) for ledger, k in zip(ledgers, kept, strict=True))]
    )
    images = np.concatenate([np.empty(0, np.int64), *(ledger.image_ids for ledger in ledgers)])
    image_pieces = np.repeat(np.arange(len(ledgers)), [len(ledger.image_ids) for ledger in ledgers])
    places = np.concatenate([np.empty(0, np.int64), *(np.arange(len(ledger.image_ids)) for ledger in ledgers)])
    needed = np.flatnonzero(wanted)
    owned = np.zeros(len(images), np.bool_)
    owned[needed[first_of_each(images[needed])]] = True
    unneeded = np.flatnonzero(~owned)
    for group in range(plan.groups):
        span = plan.group(group)
        inside = (image_pieces[unneeded] >= span.start) & (image_pieces[unneeded] < span.stop)
        of_group = pc.and_(pc.greater_equal(table["piece"], span.start), pc.less(table["piece"], span.stop))
        yield GroupDecisions(
            table.filter(of_group),
            GroupDecisions.image_table(image_pieces[unneeded[inside]], places[unneeded[inside]]),
        )


def left_out_rows(
    pieces: NDArray[np.int64],
    rows: NDArray[np.int64],
    ids: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    left_out: pa.Table,
) -> pa.Table:
    """``LEFT_OUT`` of dropped rows: those ``chosen`` with the reason in ``left_out``, the others as duplicates."""
    size = len(ids)
    order = np.argsort(left_out["id"].to_numpy(), kind="stable")
    at = np.searchsorted(left_out["id"].to_numpy()[order], ids)
    places = pa.array(
        order[np.minimum(at, max(0, len(order) - 1))] if len(order) else np.zeros(size, np.int64), mask=~chosen
    )
    columns = [left_out[name].combine_chunks().take(places) for name in ("stage", "reason", "detail")]
    columns[0] = pc.if_else(pa.array(chosen), columns[0], pa.scalar("ids"))
    columns[1] = pc.if_else(pa.array(chosen), columns[1], pa.scalar(DUPLICATE_ID))
    return pa.table([pieces.astype(np.int64), rows.astype(np.int32), *columns], schema=LEFT_OUT)


def first_of_each(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[N] whether the value is the first of its kind."""
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[np.unique(values, return_index=True)[1]] = True
    return mask


def wanted_images(ledger: PieceLedger, keep_rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[images] of a piece: whether a kept row of the piece refers to it."""
    return np.isin(ledger.image_ids, ledger.ref_images[keep_rows[ledger.ref_rows]])
