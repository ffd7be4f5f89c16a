"""Raw corpora and item tables: which files they have, split into which ranges of rows, read into which records.

A range of rows is small enough to be read again when a worker dies. Splitting counts every row before anything is
processed (from Parquet footers, or one pass over JSON lines), so a job knows how many rows it must account for.

A row that cannot be parsed becomes a ``SourceRow`` with a ``parse_error``: it is counted and rejected, and the job goes
on. A *file* that cannot be read is an error, because the number of its rows is unknown. A *storage* that fails is tried
again, and then an error of its own (``input_file``).
"""

from __future__ import annotations

import logging
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from crem.errors import ConfigError
from pipelines.sources.input_file import InputFile, current_stamp
from pipelines.sources.known_containers import CONTAINERS, container_named, container_of
from pipelines.sources.records import FileSchema, FileStamp, Ignored, RowRange, SourceRow
from pipelines.tables.storage import CLAIM, Folder

__all__ = ["FileStamp", "SourceFiles", "find", "group", "read", "schema_of", "split", "stamps"]

log = logging.getLogger(__name__)

_SPLIT_THREADS = 16
_SPLIT_AHEAD = 64
"""Files that are being split, or whose ranges wait for the caller."""

FILES = pa.schema([("name", pa.string()), ("size", pa.int64()), ("version", pa.string()), ("container", pa.string())])
"""One row a file: a table, because a corpus may have a million of them."""


@dataclass(frozen=True, eq=False)
class SourceFiles:
    """The row files of a corpus or item table, in the order of their names, and what else is there."""

    root: Folder
    """Where relative image names start."""
    folder: Folder
    """The folder of the row files."""
    table: pa.Table
    """The row files, as ``FILES``. Names are paths from ``folder``."""
    ignored: tuple[Ignored, ...] = ()
    """What is in ``root`` and is not read."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All names, for a caller that needs them at once."""
        return tuple(self.table["name"].to_pylist())

    def chunk(self, start: int, stop: int) -> SourceFiles:
        """Some of the files, for a task that splits them."""
        return SourceFiles(self.root, self.folder, self.table.slice(start, stop - start).combine_chunks())

    def files(self) -> Iterator[InputFile]:
        """The files, one at a time."""
        for batch in self.table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield InputFile(self.folder.uri, row["name"], row["container"], row["size"], row["version"])


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
            if container_of(root.name) is None:
                raise ConfigError(f"{place!r} is no file of rows; known are {_known()}")
            parent = Folder(root.uri.rpartition("/")[0] or "/")
            return SourceFiles(parent, parent, _table(parent, (root.name,)))
        folder = root.child("rows")
        if not any(container_of(name) for name in folder.files()):
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
    names = tuple(n for n in found if container_of(n) and not n.startswith((".", "_")))
    if not names:
        raise ConfigError(
            f"{what} {place!r} holds no rows, in rows/ or at its top: known are {_known()}; found {found[:4]}"
        )
    ignored = [n for n in found if n.lower().endswith((".json", ".csv", ".tsv", ".json.gz")) and n != CLAIM]
    if ignored and folder.name == "rows":
        log.warning("%s: only %s are read, not %s", folder.uri, _known(), ", ".join(ignored[:8]))
    return SourceFiles(root, folder, _table(folder, names))


def _known() -> str:
    return ", ".join(f"{container.title} ({container.suffixes[0]})" for container in CONTAINERS)


def _table(folder: Folder, names: Sequence[str]) -> pa.Table:
    found = [current_stamp(folder, name) for name in names]
    rows = [{"name": s.file, "size": s.size, "version": s.version, "container": container_of(s.file)} for s in found]
    return pa.Table.from_pylist(rows, schema=FILES)


def split(source: SourceFiles, columns: Sequence[str] | None, rows: int) -> Iterator[RowRange]:
    """Split the files into ranges of at most about ``rows`` rows, counting every row; in the order of the files.

    Several files are split at once, and few ranges wait in memory. A job of many files calls it in tasks, each on a
    ``chunk`` of the files.

    Args:
        columns: refuse a file that has none of these; ``None`` takes any.

    Raises:
        ConfigError: a file is damaged, has changed since it was listed, or has none of ``columns``.
        ResourceError: the storage stays away.
    """

    def split_file(file: InputFile) -> list[RowRange]:
        file.check_unchanged()
        container = container_named(file.container)
        if columns is not None and (present := container.schema(file).columns) and not set(present) & set(columns):
            raise ConfigError(
                f"{file.uri} has the columns {list(present)}; none of them is known here: {list(columns)}"
            )
        return list(container.split(file.identified(), rows))

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
        ResourceError: the storage stays away.
    """
    file = InputFile.of(rows)
    file.check_unchanged()
    name = unicodedata.normalize("NFC", rows.file)
    number = rows.first
    for record, parse_error in container_named(rows.container).read(rows, columns):
        yield SourceRow(f"@{rows.fingerprint}/{name}#{number}", record, parse_error, rows.file)
        number += 1
    file.check_unchanged()
    if number - rows.first != rows.rows:
        raise ConfigError(
            f"{rows.uri} has {number - rows.first} rows where it had {rows.rows} before; "
            "run again once nothing writes to it"
        )


def schema_of(file: InputFile | RowRange) -> FileSchema:
    """What a file says of its columns. Raises as ``read`` does."""
    return container_named(file.container).schema(file if isinstance(file, InputFile) else InputFile.of(file))


def stamps(source: SourceFiles) -> tuple[FileStamp, ...]:
    """The stamp of each file, as it was listed."""
    return tuple(FileStamp(file.name, file.size, file.version) for file in source.files())
