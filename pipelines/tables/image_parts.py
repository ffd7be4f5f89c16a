"""A part of the image table: a Parquet file whose footer also says where the bytes of each image stand.

Training reads single images in random order. Parquet's own unit of reading is a row group: small ones make footers of
gigabytes for a corpus of a terabyte, large ones are read whole for the sake of one image (measured in
``tests/bench/bench_reads.py``). But an encoded image is stored uncompressed, so its bytes stand in one run in the file.
``ImagePartWriter`` notes the run of each image in the footer's key-value metadata: 27 bytes an image. A reader gets the
places of all images of a part in one request and then each image in one request of exactly its bytes. To every other
program the part is plain Parquet. Because the id of an image is the hash of its bytes, a wrong place cannot go
unnoticed.

Parts from before this, or rewritten by other programs, have no places. Of their images the row is known, and reading
one of them reads its row group.
"""

from __future__ import annotations

import base64
import io
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.tables import schema
from pipelines.tables.part_reads import read_part
from pipelines.tables.storage import Folder

__all__ = ["BY_ROW", "PLACE", "ImagePartWriter", "image_places"]

PLACE = np.dtype([("id", "<i8"), ("start", "<i8"), ("length", "<i4")])
"""One image of a part: the file's bytes ``start`` to ``start + length`` are the encoded image."""
BY_ROW = -1
"""As ``length``: the place is not known, and ``start`` is the number of the row."""
_KEY = b"crem.images"
"""Key of the footer's metadata; the value is an array of ``PLACE`` in base64, in the order of the rows."""
_TAIL_BYTES = 512 * 2**10
"""Read from the end of a part to get its footer: one request up to about 15,000 images."""
_FIRST_BYTES = 64
"""Compared first when an image is sought among written bytes."""


class ImagePartWriter:
    """Writes a part: each ``write`` is one row group, of about ``schema.IMAGE_ROW_GROUP_BYTES`` of images.

    A context manager. It leaves ``sink`` open. If the block ends with an error the part is not completed.
    """

    def __init__(self, sink: IO[bytes]):
        self._sink = _RecordingSink(sink)
        self._writer = pq.ParquetWriter(
            pa.PythonFile(self._sink, mode="w"),
            schema.IMAGES,
            compression={name: "none" if name == "bytes" else "zstd" for name in schema.IMAGES.names},
            use_dictionary=False,
            column_encoding={"bytes": "PLAIN"},
            write_statistics=["id"],
        )
        self._places: list[NDArray[Any]] = []

    def write(self, images: pa.Table) -> None:
        """Add a row group of ``schema.IMAGES``."""
        self._writer.write_table(images, row_group_size=max(1, images.num_rows))
        start, written = self._sink.take()
        self._places.append(_find(images, written, start))

    def close(self) -> None:
        """Complete the part; the sink stays open."""
        places = np.concatenate([np.empty(0, PLACE), *self._places])
        self._writer.add_key_value_metadata({_KEY: base64.b64encode(places.tobytes())})
        self._writer.close()

    def __enter__(self) -> ImagePartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._sink.abandoned = True  # closing writes a footer, which would make half a part a whole one
        self.close()


class _RecordingSink(io.RawIOBase):
    """Passes on what is written, and keeps it until it is taken."""

    def __init__(self, sink: IO[bytes]):
        self._sink, self._kept, self._position = sink, bytearray(), 0
        self.abandoned = False

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        if not self.abandoned:
            self._sink.write(data)
        self._kept += data
        self._position += len(data)
        return len(data)

    def take(self) -> tuple[int, bytes]:
        """The position of what was written since the last call, and it."""
        kept, self._kept = bytes(self._kept), bytearray()
        return self._position - len(kept), kept


def image_places(images: Folder, name: str) -> NDArray[Any]:
    """[images] ``PLACE`` of every image of a part, in the order of the rows.

    Raises:
        ConfigError: the part is missing or damaged. StorageError: storage did not answer.
    """
    return read_part(images, name, lambda: _places(images, images.path(name)))


def _places(images: Folder, path: str) -> NDArray[Any]:
    metadata = _footer(images, path)
    if (stored := (metadata.metadata or {}).get(_KEY)) is not None:
        return np.frombuffer(base64.b64decode(stored), PLACE)
    with images.fs.open(path, "rb") as file:
        ids = pq.ParquetFile(file, metadata=metadata).read(columns=["id"], use_threads=False)["id"]
    places = np.empty(len(ids), PLACE)
    places["id"], places["start"], places["length"] = ids.to_numpy(), np.arange(len(ids)), BY_ROW
    return places


def _footer(images: Folder, path: str) -> pq.FileMetaData:
    size = images.fs.size(path)
    tail = images.fs.cat_file(path, start=max(0, size - _TAIL_BYTES), end=size)
    if tail[-4:] == b"PAR1" and (needed := int.from_bytes(tail[-8:-4], "little") + 8) > len(tail):
        tail = images.fs.cat_file(path, start=max(0, size - needed), end=size)
    return pq.read_metadata(pa.BufferReader(tail))


def _find(images: pa.Table, written: bytes, start: int) -> NDArray[Any]:
    """``PLACE`` of the images in ``written``, which stands in the file from ``start`` on."""
    places = np.empty(images.num_rows, PLACE)
    position = 0
    for row, (image_id, data) in enumerate(zip(images["id"].to_pylist(), images["bytes"].to_pylist(), strict=True)):
        found = _position(written, data, position)
        assert found >= 0, f"image {image_id} does not stand in one run of bytes"
        position = found + len(data)
        places[row] = (image_id, start + found, len(data))
    return places


def _position(written: bytes, image: bytes, position: int) -> int:
    """Where ``image`` stands in ``written`` from ``position`` on, or -1. (``bytes.find`` of a long value is slow.)"""
    first = image[:_FIRST_BYTES]
    while (position := written.find(first, position)) >= 0 and written[position : position + len(image)] != image:
        position += 1
    return position
