"""Parquet files: split at row groups, and within large groups. Rows are counted from the footer.

Read by PyArrow. Values become what JSON would give, so that formats need not know Arrow: decimals and times become
whole numbers or text, maps become objects, numbers of classes their names.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crem.errors import ConfigError
from pipelines.sources.class_names import class_names, with_class_names
from pipelines.sources.input_file import InputFile
from pipelines.sources.records import FileSchema, ParsedRow, RowRange, unreadable_file

__all__ = ["ParquetRows", "parsed_batch"]

_RESPLIT_BYTES = 64 * 2**20
"""A larger row group is split into few ranges, since each range reads the group from its start."""
_LARGE_GROUP_RANGES = 8
_READ_ROWS = 64
"""Rows turned into Python objects at a time; they may carry inline images."""
_STREAM_BYTES = 4 * 2**20
"""Columns of a large row group are read in pieces of this size, not as a whole."""


class ParquetRows:
    """Apache Parquet."""

    name = "parquet"
    title = "Parquet"
    suffixes: tuple[str, ...] = (".parquet", ".parq", ".pq")

    def split(self, file: InputFile, rows: int) -> Iterator[RowRange]:
        with _opened(file) as parquet:
            groups: list[int] = []
            first = collected = 0
            for index in range(parquet.metadata.num_row_groups):
                group = parquet.metadata.row_group(index)
                if groups and collected + group.num_rows > rows:
                    yield file.range(first, collected, row_groups=tuple(groups))
                    first, collected, groups = first + collected, 0, []
                if group.num_rows > rows:
                    size = rows
                    if group.total_byte_size > _RESPLIT_BYTES:
                        size = max(rows, -(-group.num_rows // _LARGE_GROUP_RANGES))
                    for start in range(0, group.num_rows, size):
                        count = min(size, group.num_rows - start)
                        yield file.range(first + start, count, row_groups=(index,), skip=start)
                    first += group.num_rows
                elif group.num_rows:
                    groups.append(index)
                    collected += group.num_rows
            if groups:
                yield file.range(first, collected, row_groups=tuple(groups))

    def read(self, rows: RowRange, columns: Sequence[str] | None) -> Iterator[ParsedRow]:
        skip, left = rows.skip, rows.rows
        with _opened(InputFile.of(rows), rows.row_groups) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else [name for name in names if name in columns]
            if not wanted:  # no column to read: the rows are still counted
                yield from (({}, "") for _ in range(left))
                return
            labels = class_names(file.schema_arrow.metadata or {})
            batches = file.iter_batches(_READ_ROWS, row_groups=list(rows.row_groups), columns=wanted)
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    raise unreadable_file(rows.folder, rows.file, error) from error
                if batch is None:
                    return
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                batch = batch.slice(skip, left)
                skip, left = 0, left - batch.num_rows
                yield from with_class_names(parsed_batch(batch), labels) if labels else parsed_batch(batch)
                if left == 0:
                    return

    def schema(self, file: InputFile) -> FileSchema:
        with _opened(file) as parquet:
            return FileSchema(tuple(parquet.schema_arrow.names))


def parsed_batch(batch: pa.RecordBatch) -> Iterator[ParsedRow]:
    """The rows of an Arrow batch; one that Python cannot hold, such as text that is not UTF-8, is a bad row alone."""
    plain = _plain if any(_needs_conversion(field.type) for field in batch.schema) else None
    try:
        yield from [(row, "") for row in _rows(batch, plain)]
    except (ValueError, OverflowError, KeyError, TypeError, pa.ArrowException):
        for i in range(batch.num_rows):
            try:
                row = _rows(batch.slice(i, 1), plain)[0]
            except (ValueError, OverflowError, KeyError, TypeError, pa.ArrowException) as error:
                yield None, f"{type(error).__name__}: {str(error)[:200]}"
            else:
                yield row, ""


def _opened(file: InputFile, row_groups: Sequence[int] = ()) -> pq.ParquetFile:
    """The file with its footer read.

    Raises:
        ConfigError: it is damaged, or two of its columns have one name, of which only one could be read.
    """
    try:
        parquet = pq.ParquetFile(file.open_raw())
        largest = max((parquet.metadata.row_group(i).total_byte_size for i in row_groups), default=0)
        if largest > _RESPLIT_BYTES:
            parquet = pq.ParquetFile(file.open_raw(), metadata=parquet.metadata, buffer_size=_STREAM_BYTES)
        names = parquet.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise unreadable_file(file.folder, file.name, error) from error
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{file.uri} has several columns of one name, {twice}; rename all but one of each")
    return parquet


def _rows(batch: pa.RecordBatch, plain: Callable[[Any], Any] | None) -> list[dict[str, Any]]:
    rows = batch.to_pylist(maps_as_pydicts="strict")
    return rows if plain is None else [{name: plain(value) for name, value in row.items()} for row in rows]


def _needs_conversion(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return True
    if pa.types.is_dictionary(kind):
        return _needs_conversion(kind.value_type)
    if kind.num_fields:
        return any(_needs_conversion(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_decimal(kind) or pa.types.is_temporal(kind) or pa.types.is_float16(kind)


def _plain(value: Any) -> Any:
    """A value as JSON would give it; bytes stay."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else str(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | uuid.UUID):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's, from half floats and tensors
        return value.tolist()
    return value
