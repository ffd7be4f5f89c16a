"""Writes one final part from the staged files of neighbouring pieces (``part_cuts``).

A part appears when it is complete; its *receipt* then says so, and a run that continues leaves it alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipelines.corpus.decisions import GroupDecisions
from pipelines.corpus.ledger import PieceLedger, read_ledgers, staged_file
from pipelines.corpus.part_cuts import PartTask
from pipelines.corpus.table_statistics import TableStatistics
from pipelines.tables import schema
from pipelines.tables.hashing_sink import HashingSink
from pipelines.tables.image_parts import ImagePartWriter
from pipelines.tables.manifest import TABLES, PartFile
from pipelines.tables.storage import Folder

__all__ = ["CommittedPart", "receipt_file", "write_empty_part", "write_part"]


@dataclass(frozen=True)
class _StagedFile:
    """A staged file of rows or images, and what to keep of it."""

    piece: int
    name: str
    keep: NDArray[np.bool_]


class CommittedPart(BaseModel):
    """The receipt of a part: its files, and what is in them."""

    model_config = ConfigDict(frozen=True)

    table: str
    number: int
    files: tuple[PartFile, ...]
    """None where nothing is left of its pieces."""
    statistics: TableStatistics


def receipt_file(task: PartTask) -> str:
    """Name of the receipt of a part, from the work folder."""
    return f"receipts/{task.group:06d}/{task.table}-{task.number:06d}.json"


def write_part(task: PartTask, *, out: Folder, work: Folder, version: str) -> CommittedPart:
    """In a worker: write one part, then its receipt."""
    staged = _StagedPart(task, work)
    name = _part_name(task.number, version)
    statistics = TableStatistics()
    files: list[PartFile] = []
    if task.table == "images":
        images, statistics = _write_images(staged, out, name)
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
    work.write_bytes(receipt.model_dump_json().encode(), receipt_file(task))
    return receipt


def write_empty_part(out: Folder, table: str, version: str) -> PartFile:
    """A part without a row, so that the schema of a table that has none can be read."""
    name = _part_name(0, version)
    file, _ = _write_table(out, table, name, lambda: iter(()), TableStatistics.of_rejected, even_if_empty=True)
    assert file is not None
    return file


def _part_name(number: int, version: str) -> str:
    return f"part-{number:06d}-{version}.parquet"


class _StagedPart:
    """What the staged files of a part hold."""

    def __init__(self, task: PartTask, work: Folder):
        self._task, self._work = task, work
        last = task.stop[0] if task.stop[1] else task.stop[0] - 1
        self._ledgers = read_ledgers(work, range(task.start[0], last + 1))
        self._decisions = GroupDecisions.read(work, task.group)

    def images(self) -> Iterator[pa.Table]:
        """The kept images."""
        return (table for table in self._filtered(self._image_files(), kept=True))

    def rows(self) -> Iterator[pa.Table]:
        """The kept rows."""
        return (table for table in self._filtered(self._row_files(), kept=True))

    def rejected(self) -> Iterator[pa.Table]:
        """The rejections that were staged, then the rows that the decisions leave out."""
        for ledger in self._ledgers:
            for number in range(len(ledger.rejected_files)):
                yield self._read(staged_file("rejected", ledger.piece, ledger.attempt, number))
        pieces = self._decisions.rows["piece"].to_numpy()
        start, stop = np.searchsorted(pieces, [self._ledgers[0].piece, self._ledgers[-1].piece + 1])
        reasons = self._decisions.rows.slice(start, stop - start)
        start = 0
        for rows in self._filtered(self._row_files(), kept=False):
            yield _rejections(rows, reasons.slice(start, rows.num_rows))
            start += rows.num_rows

    def image_counts(self) -> dict[str, int]:
        """What the ledgers say of the kept images, as fields of ``TableStatistics``."""
        shrunk, truncated = [np.zeros(1, np.int64)], 0
        for ledger in self._ledgers:
            keep = self._decisions.keep_images(ledger) & self._in_part(ledger, ledger.image_files)
            shrunk.append(ledger.shrunk_from[keep])
            truncated += int(ledger.truncated[keep].sum())
        areas = np.concatenate(shrunk)
        return {
            "images_shrunk": int((areas > 0).sum()),
            "largest_source_pixels": int(areas.max()),
            "images_truncated": truncated,
        }

    def _row_files(self) -> Iterator[_StagedFile]:
        for ledger in self._ledgers:
            yield from _staged_files("rows", ledger, ledger.row_files, self._decisions.keep_rows(ledger))

    def _image_files(self) -> Iterator[_StagedFile]:
        for ledger in self._ledgers:
            keep = self._decisions.keep_images(ledger) & self._in_part(ledger, ledger.image_files)
            yield from _staged_files("images", ledger, ledger.image_files, keep)

    def _in_part(self, ledger: PieceLedger, files: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[images] of a piece: whether they stand in files of the part."""
        places = [(ledger.piece, file) for file in range(len(files))]
        return np.repeat(np.array([self._task.start <= at < self._task.stop for at in places], np.bool_), files)

    def _filtered(self, files: Iterable[_StagedFile], *, kept: bool) -> Iterator[pa.Table]:
        """The rows of each staged file that are kept, or dropped."""
        for file in files:
            mask = file.keep if kept else ~file.keep
            if mask.any():
                found = self._read(file.name)
                yield found if mask.all() else found.filter(pa.array(mask))

    def _read(self, name: str) -> pa.Table:
        return pa.ipc.open_file(pa.BufferReader(self._work.read_bytes(name))).read_all()


def _staged_files(
    table: str, ledger: PieceLedger, files: NDArray[np.int64], keep: NDArray[np.bool_]
) -> Iterator[_StagedFile]:
    stops = np.cumsum(files).tolist()
    for number, (size, stop) in enumerate(zip(files.tolist(), stops, strict=True)):
        name = staged_file(table, ledger.piece, ledger.attempt, number)
        yield _StagedFile(ledger.piece, name, keep[stop - size : stop])


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
        sink, counted = HashingSink(file), _Counted(staged.images(), TableStatistics.of_images)
        with ImagePartWriter(cast(IO[bytes], sink)) as writer:
            for group in _regrouped(counted, _image_sizes, schema.IMAGE_ROW_GROUP_BYTES):
                writer.write(group)
        statistics = counted.statistics.model_copy(update=staged.image_counts())
        return sink.part("images", name, statistics.images), statistics

    return out.write_stream(write, "images", name)


def _write_table(
    out: Folder,
    table: str,
    name: str,
    tables: Callable[[], Iterator[pa.Table]],
    count: Callable[[pa.Table], TableStatistics],
    *,
    even_if_empty: bool = False,
) -> tuple[PartFile | None, TableStatistics]:
    """Write a part of ``rows`` or ``rejected``, if there are any."""
    counted, rows = _Counted(tables(), count), 0
    sink = pa.BufferOutputStream()
    options = {"use_dictionary": False, "write_statistics": ["id"]}  # as schema.ROWS_ROW_GROUP_ROWS says
    with pq.ParquetWriter(sink, TABLES[table], compression="zstd", write_page_checksum=True, **options) as writer:
        for found in _regrouped(counted, _ones, schema.ROWS_ROW_GROUP_ROWS):
            writer.write_table(found)
            rows += found.num_rows
    if not rows and not even_if_empty:
        return None, counted.statistics
    data = sink.getvalue().to_pybytes()
    out.write_bytes(data, table, name)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return PartFile(table=table, name=name, rows=rows, bytes=len(data), checksum=digest), counted.statistics


class _Counted:
    """Tables that pass, and the sum of what is counted of each."""

    def __init__(self, tables: Iterable[pa.Table], count: Callable[[pa.Table], TableStatistics]):
        self._tables, self._count = tables, count
        self.statistics = TableStatistics()

    def __iter__(self) -> Iterator[pa.Table]:
        for table in self._tables:
            self.statistics += self._count(table)
            yield table


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
