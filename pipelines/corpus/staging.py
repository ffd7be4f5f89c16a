"""One task of ``crem prepare``: it writes its rows, images and rejections as they come, and keeps a ledger of them.

A task flushes images to their file by size, so it holds about 4 MB of them however many rows it has. It decodes and
stores an image once, however many of its rows name it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crem.config import RunConfig
from crem.data.image_bytes import is_inline
from crem.data.images import decode_image, encode_image
from crem.errors import ItemError, shortened
from pipelines.corpus.token_limit import check_tokens
from pipelines.formats.format import RowContext
from pipelines.formats.raw_rows import COLUMNS, RawItem, RawRow, check_row, source_and_key
from pipelines.formats.registry import format_named
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.records import RowRange, SourceRow
from pipelines.tables import schema
from pipelines.tables.image_parts import ImagePartWriter
from pipelines.tables.storage import Folder, JobKind

__all__ = ["STAGING", "StagedLedger", "StagingTask", "stage", "staged_file"]

STAGING = "_staging"
"""Folder of staged files in the output of ``crem prepare``; gone once the run is complete."""
_FLUSH_BYTES = schema.IMAGE_ROW_GROUP_BYTES
_FLUSH_ROWS = 4096


@dataclass(frozen=True)
class StagingTask:
    """The rows that one task stages."""

    number: int
    """Position of the task in the order of the corpus."""
    ranges: tuple[RowRange, ...]


@dataclass(frozen=True)
class StagedLedger:
    """What one task staged: identifiers only, so that the driver can hold the ledgers of all tasks."""

    task: int
    """Number of the task."""
    token: str
    """Part of the names of its files; a retried task has another one."""
    rows_in: int
    rejected: int
    row_ids: NDArray[np.int64]
    """[rows] ids of the staged rows, in their order."""
    image_ids: NDArray[np.int64]
    """[images] ids of the staged images, in their order."""
    ref_rows: NDArray[np.int64]
    """[references] position in ``row_ids`` of the row that refers to an image."""
    ref_images: NDArray[np.int64]
    """[references] id of that image."""
    shrunk_from: NDArray[np.int64]
    """[images] area in pixels of the source of a shrunk image, 0 of one that was stored at its size."""


def staged_file(table: str, token: str) -> str:
    """Name of a task's staged file of ``table`` (``rows``, ``images`` or ``rejected``), from the output folder."""
    return f"{STAGING}/{table}-{token}.parquet"


def stage(task: StagingTask, *, out: Folder, source: str, reader: ImageReader, config: RunConfig) -> StagedLedger:
    """Stage the rows of one task under ``out``; ``source`` names the corpus in rows that have no source."""
    token = f"{task.number:06d}-{uuid.uuid4().hex[:8]}"
    with _StagingWriter(out, token, source, reader, config) as writer:
        for rows in task.ranges:
            for row in sources.read(rows, COLUMNS):
                writer.add(row)
    refs = np.array(writer.refs, np.int64).reshape(-1, 2)
    return StagedLedger(
        task=task.number,
        token=token,
        rows_in=writer.rows_in,
        rejected=writer.rows_in - len(writer.row_ids),
        row_ids=np.array(writer.row_ids, np.int64),
        image_ids=np.array(list(writer.image_ids), np.int64),
        ref_rows=refs[:, 0],
        ref_images=refs[:, 1],
        shrunk_from=np.array(list(writer.image_ids.values()), np.int64),
    )


class _StagingWriter:
    """Turns raw records into the three staged files of one task."""

    def __init__(self, out: Folder, token: str, source: str, reader: ImageReader, config: RunConfig):
        self.source = source
        self.format = format_named("crem")
        self.reader = reader
        self.config = config
        self.rows = _StagedFile(out, staged_file("rows", token), schema.ROWS, "zstd")
        self.images = _StagedFile(out, staged_file("images", token), schema.IMAGES, "none")  # already compressed
        self.rejected = _StagedFile(out, staged_file("rejected", token), schema.REJECTED, "zstd")
        self.rows_in = 0
        self.row_ids: list[int] = []
        self.image_ids: dict[int, int] = {}  # with ``shrunk_from``, in the order in which they were stored
        self.refs: list[tuple[int, int]] = []
        self._known: dict[str, int | ItemError] = {}

    def __enter__(self) -> _StagingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self.rows, self.images, self.rejected):
            file.close()

    def add(self, source_row: SourceRow) -> None:
        """Store a row, or its rejection with the reason."""
        self.rows_in += 1
        try:
            if source_row.record is None:
                raise ItemError("bad_row", source_row.parse_error)
            context = RowContext(source=self.source, key=source_row.name)
            limits = self.config.model.image
            for row in self.format.rows(source_row.record, context):
                check_row(row, max_text_chars=self.config.prepare.max_text_chars, max_images=limits.max_images_per_item)
                check_tokens(row, self.config.prepare)
                self._store(row)
        except ItemError as error:
            source, key = source_and_key(source_row.record, key=source_row.name, source=self.source)
            self.rejected.append(
                {
                    "id": schema.row_id(source, key),
                    "source": source,
                    "key": key,
                    "stage": JobKind.PREPARE.value,
                    "reason": error.reason,
                    "detail": error.detail,
                }
            )

    def _store(self, row: RawRow) -> None:
        query = self._item(row.query)
        target = None if row.target.is_empty else self._item(row.target)
        negatives = [self._item(negative) for negative in row.negatives]
        row_id = schema.row_id(row.source, row.key)
        self.rows.append(
            {
                "id": row_id,
                "source": row.source,
                "key": row.key,
                "task": row.task,
                "split": row.split,
                "query": query,
                "target": target,
                "negatives": negatives,
                "question": row.question,
                "answer": row.answer,
            }
        )
        sides = [query, *([target] if target else []), *negatives]
        self.refs += [(len(self.row_ids), image) for side in sides for image in side["images"]]
        self.row_ids.append(row_id)

    def _item(self, item: RawItem) -> schema.ArrowRow:
        """A value of ``schema.ITEM``."""
        return {
            "text": item.text,
            "instruction": item.instruction,
            "images": [self._image(image) for image in item.images],
            "image_at": list(item.image_at),
        }

    def _image(self, source: str | bytes) -> int:
        """Id of an image, decoded at its first use in this task; a bad one is bad for every row that names it."""
        if isinstance(source, bytes) or is_inline(source):
            return self._encode(source)
        known = self._known.get(source)
        if known is None:
            try:
                known = self._encode(source)
            except ItemError as error:
                known = ItemError(error.reason, error.detail)  # without the traceback, which holds the image
            self._known[source] = known
        if isinstance(known, ItemError):
            raise ItemError(known.reason, known.detail)
        return known

    def _encode(self, source: str | bytes) -> int:
        limits = self.reader.limits
        try:
            decoded = decode_image(self.reader.read(source), limits)
        except ItemError as error:
            if isinstance(source, bytes) or source[:60] in error.detail or is_inline(source):
                raise
            raise ItemError(error.reason, f"{shortened(source, 160)!r}: {error.detail}") from error
        data, width, height = encode_image(decoded.image, limits.max_pixels)
        image_id = schema.content_id(data)
        if image_id not in self.image_ids:
            area = decoded.width * decoded.height
            self.image_ids[image_id] = area if area > width * height else 0
            uri = None if is_inline(source) else source
            self.images.append(
                {"id": image_id, "bytes": data, "width": width, "height": height, "uri": uri}, size=len(data)
            )
        return image_id


class _StagedFile:
    """A Parquet file written a row group at a time; it exists only if something was appended."""

    def __init__(self, folder: Folder, name: str, table: pa.Schema, compression: str):
        self.folder = folder
        self.name = name
        self.schema = table
        self.compression = compression
        self._rows: list[schema.ArrowRow] = []
        self._bytes = 0
        self._file: Any = None
        self._writer: pq.ParquetWriter | ImagePartWriter | None = None

    def append(self, row: schema.ArrowRow, size: int = 0) -> None:
        self._rows.append(row)
        self._bytes += size
        if self._bytes >= _FLUSH_BYTES or len(self._rows) >= _FLUSH_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._file.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._file = self.folder.open(self.name, mode="wb")
            self._writer = (
                ImagePartWriter(self._file)
                if self.schema is schema.IMAGES
                else pq.ParquetWriter(self._file, self.schema, compression=self.compression)
            )
        self._writer.write(pa.Table.from_pylist(self._rows, schema=self.schema))
        self._rows, self._bytes = [], 0
