"""Lance datasets: a folder ``<name>.lance``, split at its fragments, at the version that it had when the job began.

Read by ``pylance``. A version of a dataset never changes, so a job
that others append to reads what it counted.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa

from crem.errors import ConfigError, CremError
from pipelines.sources.input_file import InputFile, storage_call
from pipelines.sources.parquet_rows import parsed_batch
from pipelines.sources.records import FileSchema, FileStamp, ParsedRow, RowRange, unreadable_file
from pipelines.tables.lance_store import is_of_storage, panicked, store_options

__all__ = ["LanceRows"]

_READ_ROWS = 64


class LanceRows:
    """A Lance dataset."""

    name = "lance"
    title = "Lance"
    suffixes: tuple[str, ...] = (".lance",)

    def split(self, file: InputFile, rows: int) -> Iterator[RowRange]:
        first = 0
        for fragment, count in _counts(file):
            for skip in range(0, count, rows):
                size = min(rows, count - skip)
                yield file.range(first + skip, size, row_groups=(fragment,), skip=skip)
            first += count

    def read(self, rows: RowRange, columns: Sequence[str] | None) -> Iterator[ParsedRow]:
        file = InputFile.of(rows)
        given = 0
        batches: Iterator[pa.RecordBatch] | None = None

        def following() -> pa.RecordBatch | None:
            nonlocal batches
            with _failures_told_apart(file):
                dataset = _opened(file.folder, file.name, file.version)
                wanted = [n for n in dataset.schema.names if columns is None or n in columns]
                batches = batches or _batches(dataset, rows, given, wanted)
                try:
                    return next(batches, None)
                except BaseException:
                    batches = None  # the next attempt begins after the rows that were given
                    raise

        while given < rows.rows and (batch := storage_call(file.uri, following)) is not None:
            given += batch.num_rows
            yield from parsed_batch(batch)

    def schema(self, file: InputFile) -> FileSchema:
        return FileSchema(tuple(_dataset(file.folder, file.name, file.version).schema.names))

    def stamp(self, file: InputFile) -> FileStamp:
        dataset = _dataset(file.folder, file.name, file.version)
        return FileStamp(file.name, int(dataset.count_rows()), str(dataset.version))

    def fingerprint(self, file: InputFile) -> str:
        """Of the schema and the names of the files, which are random and stay when the dataset is copied."""
        dataset = _dataset(file.folder, file.name, file.version)
        parts = [str(dataset.schema)]
        for fragment in dataset.get_fragments():
            data = sorted(part.path for part in fragment.metadata.files)
            parts.append(f"{fragment.fragment_id} {data} {fragment.count_rows()} {fragment.metadata.deletion_file}")
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _batches(dataset: Any, rows: RowRange, given: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """What follows the rows that were given, with the bytes of blobs, not their places.

    Raises:
        ConfigError: there are blobs, and this pylance cannot give their bytes.
    """
    blobs = [field.name for field in dataset.schema if field.name in columns and _is_blob(field)]
    try:
        return iter(
            dataset.get_fragment(rows.row_groups[0]).to_batches(
                columns=columns,
                batch_size=_READ_ROWS,
                offset=rows.skip + given,
                limit=rows.rows - given,
                **({"blob_handling": "all_binary"} if blobs else {}),
            )
        )
    except TypeError as error:
        if "blob_handling" not in str(error):
            raise
        raise ConfigError(
            f"{rows.uri} has the blob columns {blobs}, which this pylance does not read; pip install -U pylance, or "
            "write the columns without lance-encoding:blob"
        ) from error


def _is_blob(field: pa.Field) -> bool:
    """Whether a column holds blobs: in the older encoding by its metadata, in the newer by its type, also in a list."""
    return "lance.blob" in str(field.type) or (field.metadata or {}).get(b"lance-encoding:blob") == b"true"


def _counts(file: InputFile) -> list[tuple[int, int]]:
    """(id, rows that are not deleted) of each fragment."""

    def count() -> list[tuple[int, int]]:
        with _failures_told_apart(file):
            dataset = _opened(file.folder, file.name, file.version)
            return [(fragment.fragment_id, fragment.count_rows()) for fragment in dataset.get_fragments()]

    return storage_call(file.uri, count)


def _dataset(folder: str, name: str, version: str) -> Any:
    """The dataset at a version, the newest if that is empty. Raises as ``InputFile.open`` does."""
    file = InputFile(folder, name, LanceRows.name, 0, version)

    def open_it() -> Any:
        with _failures_told_apart(file):
            return _opened(folder, name, version)

    return storage_call(file.uri, open_it)


@contextmanager
def _failures_told_apart(file: InputFile) -> Iterator[None]:
    """A failure of the storage passes as it is; any other is of the dataset."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, CremError) or not (panicked(error) or isinstance(error, Exception)):
            raise
        if is_of_storage(file.folder, error):
            raise OSError(errno.EIO, str(error)[:300]) from error
        raise unreadable_file(file.folder, file.name, f"{type(error).__name__}: {str(error)[:300]}") from error


@lru_cache(maxsize=8)
def _opened_version(uri: str, version: str) -> Any:
    return _open(uri, version)


def _opened(folder: str, name: str, version: str) -> Any:
    uri = f"{folder}/{name}"
    return _opened_version(uri, version) if version else _open(uri, version)


def _open(uri: str, version: str) -> Any:
    try:
        import lance
    except ImportError as error:
        raise ConfigError(f"{uri} is a Lance dataset, which needs pylance; pip install pylance") from error
    return lance.dataset(uri, version=int(version) if version else None, storage_options=store_options(uri))
