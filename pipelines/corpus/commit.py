"""Staged files become final parts of bounded size, each written by one task from neighbouring pieces.

Which pieces make a part depends on the ledgers and decisions alone, so the parts are the same bytes for any number of
workers, and after any interruption. A part appears when it is complete; its *receipt* then says so, and a run that
continues leaves it alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipelines.corpus.decisions import GroupDecisions
from pipelines.corpus.ledger import PieceLedger, staged_file
from pipelines.corpus.table_statistics import TableStatistics
from pipelines.tables import schema
from pipelines.tables.image_parts import ImagePartWriter
from pipelines.tables.manifest import TABLES, PartFile
from pipelines.tables.storage import Folder

__all__ = ["CommittedPart", "PartTask", "cut_parts", "receipt_file", "write_empty_part", "write_part"]

_PART_ROWS = 100_000
_PART_BYTES = 128 * 2**20
"""A part of rows ends after so many staged rows or bytes, one of images after so many bytes. Source: ours."""


@dataclass(frozen=True)
class PieceSlice:
    """Staged files of one piece, and what to keep of them."""

    piece: int
    attempt: str
    files: tuple[int, ...]
    """Numbers of the staged files of the table."""
    keep: NDArray[np.bool_]
    """[rows or images in these files]"""
    rejected_files: int = 0
    """Of a part of rows: staged files of rejections of the piece."""


@dataclass(frozen=True)
class PartTask:
    """One part of ``rows``, with the rejections of its pieces, or of ``images``."""

    table: str
    number: int
    slices: tuple[PieceSlice, ...]
    left_out: pa.Table
    """Of a part of rows: ``decisions.LEFT_OUT`` of its pieces."""
    shrunk_from: NDArray[np.int64]
    """Of a part of images: of the kept ones."""
    truncated: int = 0
    """Of a part of images: how many of the kept ones lack the end of their file."""


class CommittedPart(BaseModel):
    """The receipt of a part: its files, and what is in them."""

    model_config = ConfigDict(frozen=True)

    table: str
    number: int
    files: tuple[PartFile, ...]
    """None where nothing is left of its pieces."""
    statistics: TableStatistics


def receipt_file(table: str, number: int) -> str:
    """Name of a receipt, from the work folder."""
    return f"receipts/{table}-{number:06d}.json"


def cut_parts(ledgers: Iterable[PieceLedger], decisions: GroupDecisions, first: dict[str, int]) -> Iterator[PartTask]:
    """The parts of one group of pieces.

    Args:
        ledgers: of the pieces of the group, in order.
        first: numbers of the first part of ``rows`` and of ``images``.
    """
    rows, images = _Cutter("rows", first["rows"]), _Cutter("images", first["images"])
    for ledger in ledgers:
        keep = decisions.keep_rows(ledger)
        files = tuple(range(len(ledger.row_files)))
        whole = PieceSlice(ledger.piece, ledger.attempt, files, keep, len(ledger.rejected_files))
        yield from rows.add(whole, len(keep) + ledger.rejected, ledger.row_bytes, decisions=decisions)
        keep, start = decisions.keep_images(ledger), 0
        for number, size in enumerate(ledger.image_files.tolist()):
            kept = keep[start : start + size]
            sizes, shrunk = (values[start : start + size][kept] for values in (ledger.image_bytes, ledger.shrunk_from))
            part = PieceSlice(ledger.piece, ledger.attempt, (number,), kept)
            images.truncated += int(ledger.truncated[start : start + size][kept].sum())
            yield from images.add(part, len(sizes), int(sizes.sum()), shrunk=shrunk)
            start += size
    yield from rows.end(decisions)
    yield from images.end(decisions)


class _Cutter:
    """Collects slices until they make a part."""

    def __init__(self, table: str, number: int):
        self.table, self.number = table, number
        self._slices: list[PieceSlice] = []
        self._shrunk: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self._rows = self._bytes = 0
        self.truncated = 0
        """Images without their end among those of the slices."""

    def add(
        self,
        piece: PieceSlice,
        rows: int,
        size: int,
        *,
        shrunk: NDArray[np.int64] | None = None,
        decisions: GroupDecisions | None = None,
    ) -> Iterator[PartTask]:
        if not rows:
            return
        self._slices.append(piece)
        self._rows, self._bytes = self._rows + rows, self._bytes + size
        if shrunk is not None:
            self._shrunk.append(shrunk)
        if self._bytes >= _PART_BYTES or (self.table == "rows" and self._rows >= _PART_ROWS):
            yield from self.end(decisions)

    def end(self, decisions: GroupDecisions | None) -> Iterator[PartTask]:
        """The part of what was collected, if anything was."""
        if not self._slices:
            return
        left_out = pa.table({})
        if self.table == "rows" and decisions is not None:
            pieces = pa.array([piece.piece for piece in self._slices])
            left_out = decisions.rows.filter(pc.is_in(decisions.rows["piece"], value_set=pieces))
        yield PartTask(
            self.table, self.number, tuple(self._slices), left_out, np.concatenate(self._shrunk), self.truncated
        )
        self._slices, self._shrunk = [], [np.empty(0, np.int64)]
        self._rows = self._bytes = self.truncated = 0
        self.number += 1


def write_part(task: PartTask, *, out: Folder, work: Folder, version: str) -> CommittedPart:
    """In a worker: write one part, then its receipt."""
    staged = _StagedPart(task, work)
    name = _part_name(task.number, version)
    statistics = TableStatistics()
    files: list[PartFile] = []
    if task.table == "images":
        images, statistics = _write_images(staged, out, name)
        shrunk = {
            "images_shrunk": int((task.shrunk_from > 0).sum()),
            "largest_source_pixels": int(task.shrunk_from.max(initial=0)),
            "images_truncated": task.truncated,
        }
        statistics = statistics.model_copy(update=shrunk)
        files.append(images)
    else:
        for table, tables, count in (
            ("rows", staged.rows, TableStatistics.of_rows),
            ("rejected", staged.rejected, TableStatistics.of_rejected),
        ):
            file, found = _write_table(out, table, name, tables, count)
            if file is not None:
                files.append(file)
                statistics += found
    receipt = CommittedPart(table=task.table, number=task.number, files=tuple(files), statistics=statistics)
    work.write_bytes(receipt.model_dump_json().encode(), receipt_file(task.table, task.number))
    return receipt


def write_empty_part(out: Folder, table: str, version: str) -> PartFile:
    """A part without a row, so that the schema of a table that has none can be read."""
    name = _part_name(0, version)
    file, _ = _write_table(out, table, name, lambda: iter([TABLES[table].empty_table()]), None)
    assert file is not None
    return file


def _part_name(number: int, version: str) -> str:
    return f"part-{number:06d}-{version}.parquet"


class _StagedPart:
    """What the staged files of a part hold."""

    def __init__(self, task: PartTask, work: Folder):
        self._task, self._work = task, work

    def _read(self, table: str, piece: PieceSlice, number: int) -> pa.Table:
        name = staged_file(table, piece.piece, piece.attempt, number)
        return pa.ipc.open_file(pa.BufferReader(self._work.read_bytes(name))).read_all()

    def _filtered(self, table: str, *, kept: bool) -> Iterator[tuple[PieceSlice, int, pa.Table]]:
        """(slice, number of rows before, the rows that are kept, or dropped) of each staged file."""
        for piece in self._task.slices:
            keep, start = piece.keep if kept else ~piece.keep, 0
            if not keep.any():
                continue
            for number in piece.files:
                found = self._read(table, piece, number)
                mask = keep[start : start + found.num_rows]
                yield piece, start, found if mask.all() else found.filter(pa.array(mask))
                start += found.num_rows

    def images(self) -> Iterator[pa.Table]:
        """The kept images."""
        return (table for _, _, table in self._filtered("images", kept=True))

    def rows(self) -> Iterator[pa.Table]:
        """The kept rows."""
        return (table for _, _, table in self._filtered("rows", kept=True))

    def rejected(self) -> Iterator[pa.Table]:
        """The rejections that were staged, then the rows that the decisions leave out."""
        for piece in self._task.slices:
            for number in range(piece.rejected_files):
                yield self._read("rejected", piece, number)
        reasons = self._task.left_out.sort_by([("piece", "ascending"), ("row", "ascending")])
        start = 0
        for _, _, rows in self._filtered("rows", kept=False):
            yield _rejections(rows, reasons.slice(start, rows.num_rows))
            start += rows.num_rows


def _rejections(rows: pa.Table, left_out: pa.Table) -> pa.Table:
    """``schema.REJECTED`` of rows that are left out."""
    details = [
        detail or f"key {key!r} of source {source!r} is used by an earlier row; make keys unique within a source"
        for detail, key, source in zip(
            left_out["detail"].to_pylist(), rows["key"].to_pylist(), rows["source"].to_pylist(), strict=True
        )
    ]
    columns = [rows["id"], rows["source"], rows["key"], left_out["stage"], left_out["reason"]]
    return pa.table([*columns, pa.array(details, pa.string())], schema=schema.REJECTED)


def _write_images(staged: _StagedPart, out: Folder, name: str) -> tuple[PartFile, TableStatistics]:
    def write(file: IO[bytes]) -> tuple[PartFile, TableStatistics]:
        sink, statistics = _HashingSink(file), TableStatistics()
        with ImagePartWriter(cast(IO[bytes], sink)) as writer:
            for group in _regrouped(staged.images(), _image_sizes, schema.IMAGE_ROW_GROUP_BYTES):
                writer.write(group)
                statistics += TableStatistics.of_images(group)
        return sink.part("images", name, statistics.images), statistics

    return out.write_stream(write, "images", name)


def _write_table(
    out: Folder,
    table: str,
    name: str,
    tables: Callable[[], Iterator[pa.Table]],
    count: Callable[[pa.Table], TableStatistics] | None,
) -> tuple[PartFile | None, TableStatistics]:
    """Write a part of ``rows`` or ``rejected``, if there are any."""
    statistics, rows = TableStatistics(), 0
    sink = pa.BufferOutputStream()
    options = {"use_dictionary": False, "write_statistics": ["id"]}  # as schema.ROWS_ROW_GROUP_ROWS says
    with pq.ParquetWriter(sink, TABLES[table], compression="zstd", write_page_checksum=True, **options) as writer:
        for found in _regrouped(tables(), _ones, schema.ROWS_ROW_GROUP_ROWS):
            writer.write_table(found)
            rows += found.num_rows
            statistics = statistics if count is None else statistics + count(found)
    if count is not None and not rows:
        return None, statistics
    data = sink.getvalue().to_pybytes()
    out.write_bytes(data, table, name)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return PartFile(table=table, name=name, rows=rows, bytes=len(data), checksum=digest), statistics


def _regrouped(
    tables: Iterable[pa.Table], weigh: Callable[[pa.Table], NDArray[np.int64]], limit: int
) -> Iterator[pa.Table]:
    """The same rows in tables that end where the weight of their rows reaches ``limit``."""
    held: list[pa.Table] = []
    weight = 0
    for table in tables:
        total, start, before = np.cumsum(weigh(table)), 0, 0
        while start < table.num_rows:
            stop = min(table.num_rows, int(np.searchsorted(total, before + limit - weight)) + 1)
            held.append(table.slice(start, stop - start))
            weight += int(total[stop - 1]) - before
            start, before = stop, int(total[stop - 1])
            if weight >= limit:
                yield pa.concat_tables(held).combine_chunks()
                held, weight = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _image_sizes(images: pa.Table) -> NDArray[np.int64]:
    sizes: NDArray[np.int64] = pc.binary_length(images["bytes"]).to_numpy().astype(np.int64)
    return sizes


def _ones(rows: pa.Table) -> NDArray[np.int64]:
    return np.ones(rows.num_rows, np.int64)


class _HashingSink(io.RawIOBase):
    """Passes on what is written, and hashes it."""

    def __init__(self, sink: IO[bytes]):
        super().__init__()
        self._sink, self._digest, self._position = sink, hashlib.blake2b(digest_size=16), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._sink.write(data)
        self._digest.update(data)
        self._position += len(data)
        return len(data)

    def part(self, table: str, name: str, rows: int) -> PartFile:
        """What was written."""
        return PartFile(table=table, name=name, rows=rows, bytes=self._position, checksum=self._digest.hexdigest())
