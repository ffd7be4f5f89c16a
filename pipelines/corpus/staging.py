"""One task of ``crem prepare``: its rows, images and rejections, written as they come, and the ledger of them.

Images are flushed to their file by size, so a task holds about 32 MB of them whatever the number of its rows. A
image that several rows of the task name is decoded and stored once.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crem.config import RunConfig
from crem.data.images import encode_image, load_image
from crem.errors import ItemError
from pipelines.corpus.image_reader import ImageReader
from pipelines.corpus.raw_rows import RawItem, RawRow, check_row, names_of, parse_row
from pipelines.corpus.sources import Record
from pipelines.tables import schema
from pipelines.tables.storage import Folder

__all__ = ["Stage"]

_FLUSH_BYTES = 32 * 2**20
_FLUSH_ROWS = 4096


class Stage:
    """Takes raw records, sorts them into three files."""

    def __init__(self, folder: Folder, token: str, source: str, reader: ImageReader, config: RunConfig):
        self.source = source
        self.reader = reader
        self.config = config
        self.rows = _Part(folder, f"rows-{token}.parquet", schema.ROWS, "zstd")
        self.images = _Part(folder, f"images-{token}.parquet", schema.IMAGES, "none")  # already compressed
        self.rejected = _Part(folder, f"rejected-{token}.parquet", schema.REJECTED, "zstd")
        self.rows_in = 0
        self.row_ids: list[int] = []
        self.image_ids: dict[int, None] = {}  # in the order in which they were stored
        self.refs: list[tuple[int, int]] = []
        self._seen: dict[str, int | ItemError] = {}

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (self.rows, self.images, self.rejected):
            part.close()

    def add(self, record: Record) -> None:
        """Store one record as a row, or as a rejection with its reason."""
        self.rows_in += 1
        try:
            if record.data is None:
                raise ItemError("bad_row", record.fault)
            row = parse_row(record.data, key=record.name, source=self.source)
            limits = self.config.model.image
            check_row(row, max_text_chars=self.config.prepare.max_text_chars, max_images=limits.max_images_per_item)
            self._store(row)
        except ItemError as error:
            source, key = names_of(record.data, key=record.name, source=self.source)
            self.rejected.append(
                {
                    "id": schema.row_id(source, key),
                    "source": source,
                    "key": key,
                    "stage": "prepare",
                    "reason": error.reason,
                    "detail": error.detail,
                }
            )

    def ledger(self) -> dict[str, Any]:
        """What was staged, as numbers: the input of ``prepare.decide``."""
        refs = np.array(self.refs, np.int64).reshape(-1, 2)
        return {
            "rows_in": self.rows_in,
            "rejected": self.rows_in - len(self.row_ids),
            "row_ids": np.array(self.row_ids, np.int64).tobytes(),
            "image_ids": np.array(list(self.image_ids), np.int64).tobytes(),
            "ref_rows": refs[:, 0].tobytes(),
            "ref_images": refs[:, 1].tobytes(),
        }

    def _store(self, row: RawRow) -> None:
        query = self._item(row.query)
        target = None if row.target.is_empty else self._item(row.target)
        negatives = [self._item(negative) for negative in row.negatives]
        identity = schema.row_id(row.source, row.key)
        self.rows.append(
            {
                "id": identity,
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
        self.row_ids.append(identity)

    def _item(self, item: RawItem) -> dict[str, Any]:
        return {
            "text": item.text,
            "instruction": item.instruction,
            "images": [self._image(image) for image in item.images],
        }

    def _image(self, source: str | bytes) -> int:
        """Id of an image, decoded at its first use in this task; a bad one is bad for every row that names it."""
        if isinstance(source, bytes) or source.startswith("data:"):
            return self._encode(source)
        known = self._seen.get(source)
        if known is None:
            try:
                known = self._encode(source)
            except ItemError as error:
                known = ItemError(error.reason, error.detail)  # without the traceback, which holds the image
            self._seen[source] = known
        if isinstance(known, ItemError):
            raise ItemError(known.reason, known.detail)
        return known

    def _encode(self, source: str | bytes) -> int:
        bounds = self.reader.limits
        try:
            image = load_image(self.reader.read(source), bounds)
        except ItemError as error:
            if isinstance(source, bytes) or source[:60] in error.detail:
                raise
            raise ItemError(error.reason, f"{source[:200]!r}: {error.detail}") from error
        data, width, height = encode_image(image, bounds.max_pixels)
        identity = schema.content_id(data)
        if identity not in self.image_ids:
            self.image_ids[identity] = None
            uri = None if isinstance(source, bytes) or source.startswith("data:") else source
            self.images.append(
                {"id": identity, "bytes": data, "width": width, "height": height, "uri": uri}, size=len(data)
            )
        return identity


class _Part:
    """A Parquet file written a row group at a time; it exists only if something was appended."""

    def __init__(self, folder: Folder, name: str, table: pa.Schema, compression: str):
        self.folder = folder
        self.name = name
        self.schema = table
        self.compression = compression
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._file: Any = None
        self._writer: pq.ParquetWriter | None = None

    def append(self, row: dict[str, Any], size: int = 0) -> None:
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
            self._writer = pq.ParquetWriter(self._file, self.schema, compression=self.compression)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.schema))
        self._rows, self._bytes = [], 0
