"""Raw corpora and item tables: which files they have, split into which ranges of rows, read into which records.

A range of rows is small enough to be read again when a worker dies. Splitting counts every row before anything is
processed (from Parquet footers, or one pass over JSON lines), so a job knows how many rows it must account for.

A row that cannot be parsed becomes a ``SourceRow`` with a ``parse_error``: it is counted and rejected, and the job goes
on. A *file* that cannot be read is an error, because the number of its rows is unknown. A *storage* that fails is tried
again, and then an error of its own (``input_file``).
"""

from __future__ import annotations

import json
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from crem.errors import ConfigError
from pipelines.sources.container import FolderContainer
from pipelines.sources.input_file import InputFile
from pipelines.sources.inventory import find
from pipelines.sources.known_containers import container_named
from pipelines.sources.partitions import partition_columns, with_partitions
from pipelines.sources.records import FileSchema, FileStamp, RowRange, SourceRow
from pipelines.sources.source_files import SourceFiles

__all__ = ["FileStamp", "SourceFiles", "find", "group", "identified", "read", "schema_of", "split", "stamps"]

_SPLIT_THREADS = 16
_SPLIT_AHEAD = 64
"""Files that are being split, or whose ranges wait for the caller."""


def split(source: SourceFiles, columns: Sequence[str] | None, rows: int) -> Iterator[RowRange]:
    """Split the files into ranges of at most about ``rows`` rows, counting every row; in the order of the files.

    Several files are split at once, and few ranges wait in memory. A job of many files calls it in tasks, each on a
    ``chunk`` of the files.

    Args:
        columns: refuse a file that has none of these; ``None`` takes any.

    Raises:
        ConfigError: a file is damaged, is shorter than it was listed, or has none of ``columns``.
        StorageError: the storage stays away.
    """

    def split_file(file: InputFile) -> list[RowRange]:
        container = container_named(file.container)
        if columns is not None and (present := container.schema(file).columns) and not set(present) & set(columns):
            raise ConfigError(
                f"{file.uri} has the columns {list(present)}; none of them is known here: {list(columns)}"
            )
        return list(container.split(identified(file), rows))

    pending: deque[Future[list[RowRange]]] = deque()
    with ThreadPoolExecutor(max(1, min(_SPLIT_THREADS, len(source)))) as threads:
        try:
            for file in source.files():
                pending.append(threads.submit(split_file, file))
                if len(pending) >= _SPLIT_AHEAD:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def group(ranges: Iterable[RowRange], rows: int) -> Iterator[tuple[RowRange, ...]]:
    """Join neighbouring ranges up to ``rows`` rows, so that many small files do not make many small tasks."""
    parts: list[RowRange] = []
    size = 0
    for part in ranges:
        if parts and size + part.rows > rows:
            yield tuple(parts)
            parts, size = [], 0
        parts.append(part)
        size += part.rows
    if parts:
        yield tuple(parts)


def read(rows: RowRange, columns: Sequence[str] | None = None) -> Iterator[SourceRow]:
    """The rows of a range in order, a few at a time in memory.

    Args:
        columns: the only ones that the caller uses; a container that can leaves the others unread.

    Raises:
        ConfigError: the file has changed since it was split, or is damaged.
        StorageError: the storage stays away.
    """
    file = InputFile.of(rows)
    _check_unchanged(file)
    name = unicodedata.normalize("NFC", rows.file)
    number = rows.first
    parsed = container_named(rows.container).read(rows, columns)
    if partitions := partition_columns(rows.folder, rows.file):
        parsed = with_partitions(parsed, partitions, rows.uri)
    for record, parse_error in parsed:
        yield SourceRow(f"@{rows.fingerprint}/{name}#{number}", record, parse_error, rows.file, rows.within)
        number += 1
    _check_unchanged(file)
    if number - rows.first != rows.rows:
        raise ConfigError(
            f"{rows.uri} has {number - rows.first} rows where it had {rows.rows} before; "
            "run again once nothing writes to it"
        )


def schema_of(file: InputFile | RowRange) -> FileSchema:
    """What a file says of its columns, with those of its path. Raises as ``read`` does."""
    file = file if isinstance(file, InputFile) else InputFile.of(file)
    schema = container_named(file.container).schema(file)
    return replace(schema, columns=tuple(dict.fromkeys([*schema.columns, *partition_columns(file.folder, file.name)])))


def identified(file: InputFile) -> InputFile:
    """With the fingerprint of its content, to which the columns of its path belong."""
    container = container_named(file.container)
    if isinstance(container, FolderContainer):
        return replace(file, fingerprint=container.fingerprint(file))
    return file.identified(json.dumps(partition_columns(file.folder, file.name), sort_keys=True))


def _check_unchanged(file: InputFile) -> None:
    container = container_named(file.container)
    file.check_unchanged(container.stamp(file) if isinstance(container, FolderContainer) else None)


def stamps(source: SourceFiles) -> tuple[FileStamp, ...]:
    """The stamp of each file, as it was listed."""
    return tuple(FileStamp(file.name, file.size, file.version) for file in source.files())
