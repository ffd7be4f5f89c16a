"""Raw corpora and item tables: which files they have, split into which ranges of rows, read into which records.

A range of rows is small enough to be read again when a worker dies. Splitting counts every row before anything is
processed (from Parquet footers, or one pass over JSONL), so a job knows how many rows it must account for.

A row that cannot be parsed becomes a ``SourceRow`` with a ``parse_error``: it is counted and rejected, and the job goes
on. A *file* that cannot be read is an error, because the number of its rows is unknown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from crem.errors import ConfigError
from pipelines.sources.jsonl_rows import read_lines, split_lines
from pipelines.sources.parquet_rows import read_parquet, split_parquet
from pipelines.sources.records import RowRange, SourceRow, unreadable_file
from pipelines.tables.storage import CLAIM, Folder

__all__ = ["FileStamp", "SourceFiles", "find", "group", "read", "split", "stamps"]

log = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")

_SPLIT_THREADS = 16


@dataclass(frozen=True)
class SourceFiles:
    """The row files of a corpus or item table."""

    root: Folder
    """Where relative image names start."""
    folder: Folder
    """The folder of the row files."""
    names: tuple[str, ...]
    """The row files."""


@dataclass(frozen=True)
class FileStamp:
    """Identifies the content of an input file: two runs with equal stamps read the same rows."""

    file: str
    size: int
    """Bytes."""
    version: str
    """Entity tag, or time of the last change."""


def find(place: str, *, what: str = "corpus") -> SourceFiles:
    """The row files of a folder (of its ``rows/`` if it has one), or a single file.

    Args:
        place: path or URI.
        what: the name of the input in error messages.

    Raises:
        ConfigError: ``place`` does not exist, has no row files, or cannot be read.
    """
    root = Folder.at(place)
    try:
        if root.fs.isfile(root.path()):
            if not root.name.lower().endswith(SUFFIXES):
                raise ConfigError(f"{place!r} is not one of {', '.join(SUFFIXES)}; convert it or name a folder of them")
            parent = Folder(root.uri.rpartition("/")[0] or "/")
            return SourceFiles(parent, parent, (root.name,))
        folder = root.child("rows")
        if not folder.files(*SUFFIXES):
            folder = root
        found = folder.files()
        missing = not found and not root.exists()
    except ConfigError:
        raise
    except Exception as error:  # of botocore or of the operating system: the place cannot be listed
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
    ignored = [n for n in found if n.lower().endswith((".json", ".csv", ".tsv", ".json.gz")) and n != CLAIM]
    if ignored and folder.name == "rows":
        log.warning("%s: only %s are read, not %s", folder.uri, ", ".join(SUFFIXES), ", ".join(ignored[:8]))
    return SourceFiles(root, folder, names)


def split(source: SourceFiles, columns: Sequence[str], rows: int) -> list[RowRange]:
    """Split the files into ranges of at most about ``rows`` rows, counting every row.

    Raises:
        ConfigError: a file cannot be read, or is Parquet with none of ``columns``.
    """

    def split_file(name: str) -> list[RowRange]:
        try:
            with source.folder.open(name) as file:
                if _is_parquet(name):
                    return split_parquet(file, source.folder.uri, name, columns, rows)
                return split_lines(file, source.folder.uri, name, rows)
        except (pa.ArrowException, EOFError, OSError) as error:
            raise unreadable_file(source.folder.uri, name, error) from error

    with ThreadPoolExecutor(min(_SPLIT_THREADS, len(source.names))) as threads:
        return [part for ranges in threads.map(split_file, source.names) for part in ranges]


def group(ranges: Sequence[RowRange], rows: int) -> list[tuple[RowRange, ...]]:
    """Join neighbouring ranges up to ``rows`` rows, so that many small files do not make many small tasks."""
    groups: list[list[RowRange]] = []
    size = 0
    for part in ranges:
        if not groups or size + part.rows > rows:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.rows
    return [tuple(parts) for parts in groups]


def read(rows: RowRange, columns: Sequence[str]) -> Iterator[SourceRow]:
    """The rows of a range in order, a few at a time in memory.

    Raises:
        ConfigError: the file has changed since it was split, or cannot be read.
    """
    parsed = read_parquet(rows, columns) if _is_parquet(rows.file) else read_lines(rows)
    number = rows.first
    for record, parse_error in parsed:
        yield SourceRow(f"{rows.file}#{number}", record, parse_error)
        number += 1
    if number - rows.first != rows.rows:
        raise ConfigError(
            f"{rows.folder}/{rows.file} has {number - rows.first} rows where it had {rows.rows} before; "
            "run again once nothing writes to it"
        )


def stamps(source: SourceFiles) -> tuple[FileStamp, ...]:
    """The stamp of each file."""

    def stamp(name: str) -> FileStamp:
        info = source.folder.fs.info(source.folder.path(name))
        version = info.get("ETag") or info.get("mtime") or info.get("LastModified")
        return FileStamp(name, info["size"], str(version))

    return tuple(stamp(name) for name in source.names)


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")
