"""Rows of JSONL files, plain or compressed by gzip. Blank lines do not count.

Plain files are split at byte offsets. Gzip cannot be read from the middle, so its ranges are larger, and each one
decompresses everything before it.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import IO

from pipelines.sources.records import ParsedRow, RowRange, unreadable_file
from pipelines.tables.storage import Folder

__all__ = ["read_lines", "split_lines"]

_MAX_LINE_BYTES = 64 * 2**20
"""A longer line is a bad row; it is never held in memory as a whole."""
_GZIP_RANGE_ROWS = 16_384


def split_lines(file: IO[bytes], folder: str, name: str, rows: int) -> list[RowRange]:
    """Ranges of ``rows`` rows, of at least ``_GZIP_RANGE_ROWS`` in a gzip file."""
    zipped = _is_gzip(name)
    size = max(rows, _GZIP_RANGE_ROWS) if zipped else rows
    starts: list[int] = []
    count = 0
    for offset, _ in _lines(_opened(file, zipped)):
        if count % size == 0:
            starts.append(offset)
        count += 1
    return [
        RowRange(folder, name, i * size, min(size, count - i * size), skip=i * size if zipped else 0, offset=start)
        for i, start in enumerate(starts)
    ]


def read_lines(rows: RowRange) -> Iterator[ParsedRow]:
    """The rows of a range in order.

    Raises:
        ConfigError: the file cannot be read.
    """
    zipped = _is_gzip(rows.file)
    try:
        with Folder(rows.folder).open(rows.file) as handle:
            if not zipped:
                handle.seek(rows.offset)
            skip, left = rows.skip, rows.rows
            for _, line in _lines(_opened(handle, zipped)):
                if skip:
                    skip -= 1
                    continue
                yield _parse(line)
                left -= 1
                if left == 0:
                    return
    except (EOFError, OSError) as error:
        raise unreadable_file(rows.folder, rows.file, error) from error


def _is_gzip(name: str) -> bool:
    return name.lower().endswith(".gz")


def _parse(line: bytes | None) -> ParsedRow:
    if line is None:
        return None, f"a line of more than {_MAX_LINE_BYTES} bytes; keep images in images/ or in Parquet"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return None, f"not a line of JSON: {error}: {line[:60]!r}"
    if not isinstance(value, dict):
        return None, f"a JSON {type(value).__name__}, not an object: {line[:60]!r}"
    return value, ""


def _opened(file: IO[bytes], zipped: bool) -> IO[bytes]:
    return gzip.open(file, "rb") if zipped else io.BufferedReader(file, 2**20)  # type: ignore[type-var,return-value]


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(byte offset from here, line) of every non-blank line; ``None`` for a line over ``_MAX_LINE_BYTES``."""
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
