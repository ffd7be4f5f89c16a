"""The parts of an embedding output, read: Parquet files, or the data files of a Lance dataset.

``open_part_rows`` is the one place that tells the two apart. A data file of Lance is read by itself, without the
dataset's manifest: which files belong to the output is what ledgers say, of either kind.

Parquet's pages have checksums, which every read compares. Lance's files have none, and a flipped bit there is another
number: who has the checksum of the whole file gives it, and the bytes are compared before the rows are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from lance.file import LanceFileReader

from pipelines.tables.lance_store import lance_failures, store_options
from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.storage import Folder
from pipelines.tables.vector_types import vector_columns

__all__ = ["LANCE_SUFFIX", "PartFooter", "PartRows", "checksum_of", "open_part_rows", "part_footer", "read_part"]

LANCE_SUFFIX = ".lance"
_PIECE_BYTES = 8 * 2**20


class PartFooter(NamedTuple):
    """What a part says of itself."""

    schema: pa.Schema
    rows: int

    @property
    def stamp(self) -> EmbeddingStamp | None:
        """``None`` where crem embed did not write it."""
        return EmbeddingStamp.of(self.schema)


class PartRows(Protocol):
    """A part that is open."""

    @property
    def footer(self) -> PartFooter: ...

    def batches(self, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Columns of the rows in their order, at most so many rows at a time."""
        ...

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows."""
        ...


@contextmanager
def open_part_rows(folder: Folder, name: str, checksum: str | None = None) -> Iterator[PartRows]:
    """Open a part; what it raises is raised by reading it too.

    Args:
        checksum: of the file, which is compared where its pages have none.

    Raises:
        pyarrow.ArrowException or OSError: it is missing or damaged.
    """
    if not name.endswith(LANCE_SUFFIX):
        with folder.open(name) as file:
            yield _ParquetRows(pq.ParquetFile(file, page_checksum_verification=True))
        return
    if checksum is not None and (found := checksum_of(folder, name)[0]) != checksum:
        raise pa.ArrowInvalid(f"its checksum is {found}, and it was written with {checksum}")
    yield _LanceRows(f"{folder.uri}/{name}")


def part_footer(folder: Folder, name: str) -> PartFooter:
    """Schema and rows of a part, without its rows. Raises as ``open_part_rows`` does."""
    with open_part_rows(folder, name) as part:
        return part.footer


def read_part(
    folder: Folder, name: str, columns: Sequence[str] | None = None, *, checksum: str | None = None
) -> pa.Table:
    """Columns of a part, all where ``None``; with ``embedding`` those that ``vector_types.unit_vectors`` needs.

    Raises as ``open_part_rows`` does.
    """
    with open_part_rows(folder, name, checksum) as part:
        names = part.footer.schema.names
        if columns is None:
            return part.table(names)
        needed = vector_columns(names) if "embedding" in columns else []
        return part.table(list(dict.fromkeys([*columns, *needed])))


def checksum_of(folder: Folder, name: str) -> tuple[str, int]:
    """BLAKE2b of the bytes of a file, and their number; it is read once."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with folder.open(name) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


@dataclass(frozen=True)
class _ParquetRows:
    file: pq.ParquetFile

    @property
    def footer(self) -> PartFooter:
        return PartFooter(self.file.schema_arrow, self.file.metadata.num_rows)

    def batches(self, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        yield from self.file.iter_batches(rows, columns=list(columns), use_threads=False)

    def table(self, columns: Sequence[str]) -> pa.Table:
        return self.file.read(columns=list(columns))


@dataclass(frozen=True)
class _LanceRows:
    uri: str

    @property
    def footer(self) -> PartFooter:
        with lance_failures(self.uri):
            reader = self._reader(None)
            return PartFooter(reader.metadata().schema, reader.num_rows())

    def batches(self, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with lance_failures(self.uri):
            yield from self._reader(columns).read_all(batch_size=rows).to_batches()

    def table(self, columns: Sequence[str]) -> pa.Table:
        metadata = self.footer.schema.metadata
        with lance_failures(self.uri):
            return self._reader(columns).read_all().to_table().replace_schema_metadata(metadata)

    def _reader(self, columns: Sequence[str] | None) -> Any:
        return LanceFileReader(self.uri, store_options(self.uri), None if columns is None else list(columns))
