"""Columns that stand in paths: ``lang=en/split=train/x.parquet``, as Hive, Spark and Arrow write partitioned tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from urllib.parse import unquote

from pipelines.sources.records import ParsedRow, RawRecord

__all__ = ["partition_columns", "with_partitions"]

log = logging.getLogger(__name__)

_NULL = "__HIVE_DEFAULT_PARTITION__"


def partition_columns(folder: str, file: str) -> dict[str, str | None]:
    """Values by column: of the folders between ``folder`` and the file, and of those at the end of ``folder`` itself.

    The latter, because someone who names ``…/split=test`` means a part of the table and not another table.
    """
    above = folder.rstrip("/").split("/")
    first = len(above)
    while first and "=" in above[first - 1]:
        first -= 1
    columns: dict[str, str | None] = {}
    for part in [*above[first:], *file.split("/")[:-1]]:
        name, equals, value = part.partition("=")
        if equals and name.strip():
            columns[unquote(name)] = None if value == _NULL else unquote(value)
    return columns


def with_partitions(rows: Iterator[ParsedRow], columns: dict[str, str | None], uri: str) -> Iterator[ParsedRow]:
    """The rows with the columns of their path. A column that the file has too is the file's; a difference is said."""
    said: set[str] = set()
    for record, why in rows:
        if record is not None:
            for name in columns.keys() & record.keys() - said:
                if str(record[name]) != str(columns[name]):
                    said.add(name)
                    log.warning(
                        "%s: column %r is %.60r in the file and %.60r in its path; the file's counts",
                        uri, name, record[name], columns[name],
                    )  # fmt: skip
            merged: RawRecord = {**columns, **record}
            record = merged
        yield record, why
