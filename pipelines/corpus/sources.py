"""Raw corpora and item tables: which files, cut into which pieces, read into which records.

The unit of work is a *piece*: some rows of one file, small enough to be read again when a worker dies. Cutting counts
every row before anything is processed (Parquet footers, one pass over JSONL for line offsets), so a job knows how many
rows it must account for. Plain JSONL is cut at byte offsets; gzip cannot be entered in the middle, so its pieces are
larger and each decompresses what lies before it.

A line or a row that cannot be parsed becomes a record with a ``fault``: it is counted and rejected, never an abort. A
*file* that cannot be read is an error, because the number of its rows is unknown.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from crem.errors import ConfigError
from pipelines.tables.storage import CLAIM, Folder

__all__ = ["Piece", "Record", "Source", "absolute", "find", "group", "read", "split", "stamp"]

log = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")

_MAX_LINE_BYTES = 64 * 2**20
"""A longer JSONL line is a bad row; it is never held in memory whole."""
_RESPLIT_BYTES = 64 * 2**20
"""A Parquet row group is cut into several pieces only below this size, since each piece reads the group again."""
_GZIP_PIECE_ROWS = 16_384
_READ_ROWS = 64
"""Rows turned into Python objects at a time; they may carry inline images."""
_PLAN_THREADS = 16


@dataclass(frozen=True)
class Piece:
    """Rows ``first`` to ``first + rows - 1`` of one file."""

    folder: str
    file: str
    first: int
    rows: int
    row_groups: tuple[int, ...] = ()
    """Parquet: the groups that hold them."""
    skip: int = 0
    """Parquet: rows of the first group that belong to the piece before. Gzip: non-blank lines before the first."""
    offset: int = 0
    """JSONL: byte offset of the first line."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "row_groups": list(self.row_groups)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Piece:
        return cls(**{**fields, "row_groups": tuple(int(g) for g in fields["row_groups"])})


@dataclass(frozen=True)
class Record:
    """One raw row. ``data`` is ``None`` and ``fault`` says why where the row could not be parsed."""

    name: str
    """``<file>#<number of the row in it>``, the key of a row that brings none."""
    data: dict[str, Any] | None
    fault: str = ""


@dataclass(frozen=True)
class Source:
    """Files of rows, and the folder that relative image names start from."""

    root: Folder
    rows: Folder
    names: tuple[str, ...]


def find(place: str, *, what: str = "corpus") -> Source:
    """The row files of a folder (its ``rows/`` if there is one), or a single file.

    Raises:
        ConfigError: nothing there, no row files, or a place that cannot be read.
    """
    folder = Folder.at(place)
    try:
        if folder.fs.isfile(folder.path()):
            if not folder.name.lower().endswith(SUFFIXES):
                raise ConfigError(f"{place!r} is not one of {', '.join(SUFFIXES)}; convert it or name a folder of them")
            parent = Folder(folder.uri.rpartition("/")[0] or "/")
            return Source(parent, parent, (folder.name,))
        rows = folder.child("rows")
        if not rows.files(*SUFFIXES):
            rows = folder
        found = rows.files()
        missing = not found and not folder.exists()
    except ConfigError:
        raise
    except Exception as error:  # botocore's and the operating system's alike: the place cannot be listed
        raise ConfigError(
            f"{what} {place!r} cannot be read: {type(error).__name__}: {error}; check the address, and for s3:// "
            "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    if missing:
        raise ConfigError(f"{what} {place!r} does not exist; give the folder or s3:// URI that holds rows/*.parquet")
    names = tuple(n for n in found if n.lower().endswith(SUFFIXES) and not n.startswith((".", "_")))
    if not names:
        raise ConfigError(
            f"{what} {place!r} holds no {', '.join(SUFFIXES)} file, in rows/ or at its top; found {found[:4]}"
        )
    others = [n for n in found if n.lower().endswith((".json", ".csv", ".tsv", ".json.gz")) and n != CLAIM]
    if others and rows.name == "rows":
        log.warning("%s: not read, because only %s are: %s", rows.uri, ", ".join(SUFFIXES), ", ".join(others[:8]))
    return Source(folder, rows, names)


def split(source: Source, columns: Sequence[str], rows: int) -> list[Piece]:
    """Cut the files into pieces of at most about ``rows`` rows, counting every row.

    Raises:
        ConfigError: a file that cannot be read, or Parquet without any of ``columns``.
    """
    with ThreadPoolExecutor(min(_PLAN_THREADS, len(source.names))) as threads:
        pieces = list(threads.map(lambda name: _split_file(source.rows, name, columns, rows), source.names))
    return [piece for of_file in pieces for piece in of_file]


def group(pieces: Sequence[Piece], rows: int) -> list[list[Piece]]:
    """Put neighbouring pieces together up to ``rows`` rows, so that many small files do not make many small tasks."""
    groups: list[list[Piece]] = []
    held = 0
    for piece in pieces:
        if not groups or held + piece.rows > rows:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += piece.rows
    return groups


def read(piece: Piece, columns: Sequence[str]) -> Iterator[Record]:
    """The piece's records in order, a few at a time in memory.

    Raises:
        ConfigError: the file has changed since it was split, or is damaged.
    """
    numbered = _read_parquet(piece, columns) if piece.file.lower().endswith(".parquet") else _read_lines(piece)
    number = piece.first
    for data, fault in numbered:
        yield Record(f"{piece.file}#{number}", data, fault)
        number += 1
    if number - piece.first != piece.rows:
        raise ConfigError(
            f"{piece.folder}/{piece.file} has {number - piece.first} rows where it had {piece.rows} before; "
            "run again once nothing writes to it"
        )


def _split_file(folder: Folder, name: str, columns: Sequence[str], rows: int) -> list[Piece]:
    try:
        with folder.open(name) as file:
            if name.lower().endswith(".parquet"):
                return _split_parquet(pq.ParquetFile(file), folder.uri, name, columns, rows)
            return _split_lines(file, folder.uri, name, rows)
    except (pa.ArrowException, EOFError, OSError) as error:
        raise _damaged(folder.uri, name, error) from error


def _split_parquet(file: pq.ParquetFile, folder: str, name: str, columns: Sequence[str], rows: int) -> list[Piece]:
    present = file.schema_arrow.names
    if not set(present) & set(columns):
        raise ConfigError(f"{folder}/{name} has the columns {present}; none of them is known here: {list(columns)}")
    pieces: list[Piece] = []
    groups: list[int] = []
    first = held = 0
    for index in range(file.metadata.num_row_groups):
        meta = file.metadata.row_group(index)
        if groups and held + meta.num_rows > rows:
            pieces.append(Piece(folder, name, first, held, tuple(groups)))
            first, held, groups = first + held, 0, []
        if meta.num_rows > rows and meta.total_byte_size <= _RESPLIT_BYTES:
            for start in range(0, meta.num_rows, rows):
                size = min(rows, meta.num_rows - start)
                pieces.append(Piece(folder, name, first + start, size, (index,), skip=start))
            first += meta.num_rows
        elif meta.num_rows:
            groups.append(index)
            held += meta.num_rows
    if groups:
        pieces.append(Piece(folder, name, first, held, tuple(groups)))
    return pieces


def _split_lines(file: IO[bytes], folder: str, name: str, rows: int) -> list[Piece]:
    zipped = name.lower().endswith(".gz")
    size = max(rows, _GZIP_PIECE_ROWS) if zipped else rows
    starts: list[int] = []
    count = 0
    for offset, _ in _lines(_buffered(file, zipped)):
        if count % size == 0:
            starts.append(offset)
        count += 1
    return [
        Piece(folder, name, i * size, min(size, count - i * size), skip=i * size, offset=start)
        if zipped
        else Piece(folder, name, i * size, min(size, count - i * size), offset=start)
        for i, start in enumerate(starts)
    ]


def _read_parquet(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[dict[str, Any] | None, str]]:
    skip, left = piece.skip, piece.rows
    try:
        with Folder(piece.folder).open(piece.file) as handle:
            file = pq.ParquetFile(handle)
            wanted = [c for c in file.schema_arrow.names if c in columns]
            for batch in file.iter_batches(_READ_ROWS, row_groups=list(piece.row_groups), columns=wanted):
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                batch = batch.slice(skip, left)
                skip, left = 0, left - batch.num_rows
                yield from _rows(batch)
                if left == 0:
                    return
    except (pa.ArrowException, OSError) as error:
        raise _damaged(piece.folder, piece.file, error) from error


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any] | None, str]]:
    try:
        yield from [(row, "") for row in batch.to_pylist()]
    except (ValueError, OverflowError, pa.ArrowException):  # e.g. text that is not UTF-8: find the rows at fault
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0], ""
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield None, f"{type(error).__name__}: {error}"


def _read_lines(piece: Piece) -> Iterator[tuple[dict[str, Any] | None, str]]:
    zipped = piece.file.lower().endswith(".gz")
    try:
        with Folder(piece.folder).open(piece.file) as handle:
            if not zipped:
                handle.seek(piece.offset)
            skip, left = piece.skip, piece.rows
            for _, line in _lines(_buffered(handle, zipped)):
                if skip:
                    skip -= 1
                    continue
                yield _parse(line)
                left -= 1
                if left == 0:
                    return
    except (EOFError, OSError) as error:
        raise _damaged(piece.folder, piece.file, error) from error


def _parse(line: bytes | None) -> tuple[dict[str, Any] | None, str]:
    if line is None:
        return None, f"a line of more than {_MAX_LINE_BYTES} bytes; keep images in images/ or in Parquet"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return None, f"not a line of JSON: {error}: {line[:60]!r}"
    if not isinstance(value, dict):
        return None, f"a JSON {type(value).__name__}, not an object: {line[:60]!r}"
    return value, ""


def _buffered(file: IO[bytes], zipped: bool) -> IO[bytes]:
    return gzip.open(file, "rb") if zipped else io.BufferedReader(file, 2**20)  # type: ignore[arg-type,return-value,type-var]


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(byte offset from here, line) of every non-blank line; ``None`` for one that is too long to hold."""
    end = 0
    while line := file.readline(_MAX_LINE_BYTES):
        start, end = end, end + len(line)
        if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                end += len(rest)
            end += len(rest)
            yield start, None
        elif line.strip():
            yield start, line


def _damaged(folder: str, name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{folder}/{name} cannot be read: {type(error).__name__}: {error}; replace it or take it out of the folder"
    )


def stamp(source: Source) -> list[dict[str, Any]]:
    """Name, size and version (entity tag or time of change) of each file: whether two runs saw the same input."""
    stamps = []
    for name in source.names:
        info = source.rows.fs.info(source.rows.path(name))
        version = info.get("ETag") or info.get("mtime") or info.get("LastModified")
        stamps.append({"file": name, "size": info["size"], "version": str(version)})
    return stamps


def absolute(name: str) -> bool:
    """Whether an image's name stands for itself: an absolute path, a URI or a data URL."""
    return "://" in name or name.startswith("data:") or os.path.isabs(name)
