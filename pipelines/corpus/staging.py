"""One piece of ``crem prepare``: its rows, images and rejections go to staged files, and their identifiers to a ledger.

A task writes images by size, so it holds about 16 MB of them however many rows it has. Every file is written from
memory in one piece, so a failure of the storage in the middle of it costs nothing. A task decodes and stores an image
once, however many of its rows name it.
"""

from __future__ import annotations

import json
import posixpath
import uuid
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from crem.config import RunConfig
from crem.data.image_bytes import is_inline
from crem.data.images import decode_image, encode_image
from crem.errors import ItemError, shortened
from pipelines.corpus.ledger import PieceLedger, staged_file
from pipelines.corpus.token_limit import check_tokens
from pipelines.corpus.work_plan import Piece
from pipelines.formats.detection import Detection
from pipelines.formats.raw_rows import RawItem, RawRow, check_row, source_and_key
from pipelines.formats.record_reader import RecordReader
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.records import SourceRow
from pipelines.tables import schema
from pipelines.tables.storage import Folder

__all__ = ["PieceCounts", "stage", "stage_of"]

_FLUSH_BYTES = 16 * 2**20
_FLUSH_ROWS = 4096
_STAGES = {
    **dict.fromkeys(("image_missing", "uri_unreadable", "uri_refused"), "read"),
    **dict.fromkeys(("image_corrupt", "image_too_large"), "decode"),
    **dict.fromkeys(("text_too_long",), "text"),
}


@dataclass(frozen=True)
class PieceCounts:
    """What the driver hears of a piece that is staged."""

    piece: int
    records: int
    rows_in: int
    rejected: int
    images: int

    @classmethod
    def of(cls, ledger: PieceLedger) -> PieceCounts:
        """The counts of a ledger."""
        return cls(ledger.piece, ledger.records, ledger.rows_in, ledger.rejected, len(ledger.image_ids))


def stage_of(reason: str) -> str:
    """The stage at which a row was rejected, by the reason: ``parse`` of most."""
    return _STAGES.get(reason, "parse")


def stage(
    piece: Piece,
    *,
    work: Folder,
    source: str,
    rows_folder: str,
    detection: Detection,
    reader: ImageReader,
    config: RunConfig,
) -> PieceCounts:
    """Stage a piece in the work folder.

    Args:
        source: names the corpus in rows that have no source.
        rows_folder: path of the folder of the row files from that of the corpus.
    """
    writer = _PieceWriter(work, piece.number, RecordReader(detection, source), reader, config)
    for rows in piece.ranges:
        for row in sources.read(rows):
            writer.add(row, posixpath.join(rows_folder, row.folder))
    return PieceCounts.of(writer.finish())


class _PieceWriter:
    """Turns raw records into the staged files and the ledger of one piece."""

    def __init__(self, work: Folder, piece: int, records: RecordReader, reader: ImageReader, config: RunConfig):
        self.work, self.piece = work, piece
        self.attempt = uuid.uuid4().hex[:8]
        self.parser = records
        self.reader = reader
        self.config = config
        self.rows = _StagedTable(self, "rows", schema.ROWS, "lz4")
        self.images = _StagedTable(self, "images", schema.IMAGES, None)  # already compressed
        self.rejected = _StagedTable(self, "rejected", schema.REJECTED, "lz4")
        self.records = 0
        self.row_ids: list[int] = []
        self.image_ids: dict[int, tuple[int, int, bool]] = {}  # (bytes, shrunk_from, truncated), as they were stored
        self.refs: list[tuple[int, int]] = []
        self._folder = ""
        self._known: dict[tuple[str, str], int | ItemError] = {}

    def add(self, source_row: SourceRow, folder: str) -> None:
        """Store the rows of a record of a file in ``folder``, or their rejections with the reasons."""
        self.records += 1
        self._folder = folder
        limits = self.config.model.image
        try:
            rows = self.parser.rows(source_row)
        except ItemError as error:
            source, key = source_and_key(source_row.record, key=source_row.name, source=self.parser.source)
            self._reject(source, key, error)
            return
        for row in rows:
            try:
                check_row(row, max_text_chars=self.config.prepare.max_text_chars, max_images=limits.max_images_per_item)
                check_tokens(row, self.config.prepare)
                self._store(row)
            except ItemError as error:
                self._reject(row.source, row.key, error)

    def finish(self) -> PieceLedger:
        """Write what is left, then the ledger."""
        for table in (self.rows, self.images, self.rejected):
            table.flush()
        refs = np.array(self.refs, np.int64).reshape(-1, 2)
        images = np.array(list(self.image_ids.values()), np.int64).reshape(-1, 3)
        ledger = PieceLedger(
            piece=self.piece,
            attempt=self.attempt,
            records=self.records,
            rows_in=len(self.row_ids) + sum(self.rejected.files),
            rejected=sum(self.rejected.files),
            row_ids=np.array(self.row_ids, np.int64),
            image_ids=np.array(list(self.image_ids), np.int64),
            image_bytes=images[:, 0],
            shrunk_from=images[:, 1],
            truncated=images[:, 2],
            ref_rows=refs[:, 0],
            ref_images=refs[:, 1],
            row_files=np.array(self.rows.files, np.int64),
            row_bytes=self.rows.written_bytes,
            image_files=np.array(self.images.files, np.int64),
            rejected_files=np.array(self.rejected.files, np.int64),
            unknown_columns=json.dumps(dict(self.parser.unknown.counts)),
        )
        ledger.write(self.work)
        return ledger

    def _reject(self, source: str, key: str, error: ItemError) -> None:
        self.rejected.append(
            {
                "id": schema.row_id(source, key),
                "source": source,
                "key": key,
                "stage": stage_of(error.reason),
                "reason": error.reason,
                "detail": error.detail,
            },
            len(error.detail),
        )

    def _store(self, row: RawRow) -> None:
        query = self._item(row.query)
        target = None if row.target.is_empty else self._item(row.target)
        negatives = [self._item(negative) for negative in row.negatives]
        row_id = schema.row_id(row.source, row.key)
        sides = [query, *([target] if target else []), *negatives]
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
            },
            sum(len(side["text"] or "") for side in sides) + len(row.question or "") + len(row.answer or ""),
        )
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
        name = (self._folder, source)
        known = self._known.get(name)
        if known is None:
            try:
                known = self._encode(source)
            except ItemError as error:
                known = ItemError(error.reason, error.detail)  # without the traceback, which holds the image
            self._known[name] = known
        if isinstance(known, ItemError):
            raise ItemError(known.reason, known.detail)
        return known

    def _encode(self, source: str | bytes) -> int:
        limits = self.reader.limits
        try:
            decoded = decode_image(self.reader.read(source, near=self._folder), limits)
        except ItemError as error:
            if isinstance(source, bytes) or source[:60] in error.detail or is_inline(source):
                raise
            raise ItemError(error.reason, f"{shortened(source, 160)!r}: {error.detail}") from error
        settings = self.config.prepare
        data, width, height = encode_image(
            decoded.image, limits.max_pixels, kind=settings.image_format, quality=settings.image_quality
        )
        image_id = schema.content_id(data)
        if image_id not in self.image_ids:
            area = decoded.width * decoded.height
            self.image_ids[image_id] = (len(data), area if area > width * height else 0, decoded.truncated)
            uri = None if is_inline(source) else source
            self.images.append({"id": image_id, "bytes": data, "width": width, "height": height, "uri": uri}, len(data))
        return image_id


class _StagedTable:
    """Rows of one table, written as Arrow files of bounded size."""

    def __init__(self, writer: _PieceWriter, name: str, table: pa.Schema, compression: str | None):
        self._writer, self._name, self._schema = writer, name, table
        self._options = pa.ipc.IpcWriteOptions(compression=compression)
        self._rows: list[schema.ArrowRow] = []
        self._bytes = 0
        self.files: list[int] = []
        """Rows of each file."""
        self.written_bytes = 0

    def append(self, row: schema.ArrowRow, size: int) -> None:
        self._rows.append(row)
        self._bytes += size
        if self._bytes >= _FLUSH_BYTES or len(self._rows) >= _FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are held, if there are any."""
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self._schema, options=self._options) as file:
            file.write_table(table)
        writer, data = self._writer, sink.getvalue()
        name = staged_file(self._name, writer.piece, writer.attempt, len(self.files))
        writer.work.write_bytes(data.to_pybytes(), name)
        self.files.append(len(self._rows))
        self.written_bytes += data.size
        self._rows, self._bytes = [], 0
