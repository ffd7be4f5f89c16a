"""JSON lines, plain or compressed. Blank lines do not count.

Counting the rows takes one pass over the file. Plain files are split at byte offsets. A compressed one cannot be read
from the middle, so its ranges are larger, and each decompresses everything before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO, Any

from pipelines.sources.compression import COMPRESSIONS, STREAM_ERRORS, decompressed, is_compressed
from pipelines.sources.input_file import InputFile
from pipelines.sources.records import FileSchema, ParsedRow, RawRecord, RowRange, unreadable_file

__all__ = ["COMPRESSED_RANGE_ROWS", "JsonlRows", "parse_json", "parse_object", "physical_lines", "storable_name"]

_MAX_LINE_BYTES = 64 * 2**20
"""A longer line is a bad row; it is never held in memory as a whole."""
COMPRESSED_RANGE_ROWS = 16_384
"""A range of a compressed file decompresses all before it, so there are few."""
_SNIFFED_ROWS = 100


class JsonlRows:
    """JSON lines."""

    name = "jsonl"
    title = "JSON lines"
    suffixes: tuple[str, ...] = tuple(s + c for s in (".jsonl", ".ndjson") for c in COMPRESSIONS)

    def split(self, file: InputFile, rows: int) -> Iterator[RowRange]:
        size = max(rows, COMPRESSED_RANGE_ROWS) if is_compressed(file.name) else rows
        start = count = 0
        try:
            with decompressed(file) as stream:
                for offset, _ in _lines(stream):
                    if count and count % size == 0:
                        yield file.range(count - size, size, offset=start, end=offset)
                    if count % size == 0:
                        start = offset
                    count += 1
        except STREAM_ERRORS as error:
            raise unreadable_file(file.folder, file.name, error) from error
        if count:
            last = (count - 1) // size * size
            yield file.range(last, count - last, offset=start)

    def read(self, rows: RowRange, columns: Sequence[str] | None) -> Iterator[ParsedRow]:
        try:
            with decompressed(InputFile.of(rows), rows.offset, rows.end) as stream:
                for _, line in islice(_lines(stream, rows.offset), rows.rows):
                    yield _parse(line)
        except STREAM_ERRORS as error:
            raise unreadable_file(rows.folder, rows.file, error) from error

    def schema(self, file: InputFile) -> FileSchema:
        try:
            with decompressed(file) as stream:
                records = [_parse(line)[0] for _, line in islice(_lines(stream), _SNIFFED_ROWS)]
        except STREAM_ERRORS as error:
            raise unreadable_file(file.folder, file.name, error) from error
        return FileSchema(tuple(dict.fromkeys(name for record in records if record for name in record)))


def parse_object(data: bytes, what: str) -> ParsedRow:
    """A JSON object as a record."""
    value, why = parse_json(data, what)
    if why:
        return None, why
    if not isinstance(value, dict):
        return None, f"a JSON {type(value).__name__}, not an object: {data[:60]!r}"
    return value, ""


def parse_json(data: bytes, what: str) -> tuple[Any, str]:
    """A value, or why it cannot be used; an object with two values of one name is refused: only one could be read."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique), ""
    except (ValueError, RecursionError) as error:
        return None, f"not {what}: {error}: {data[:60]!r}"


def physical_lines(file: IO[bytes], limit: int = _MAX_LINE_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """(byte offset from here, line) of every line; ``None`` for a line over ``limit``."""
    end = 0
    while line := file.readline(limit):
        start, end = end, end + len(line)
        if len(line) == limit and not line.endswith(b"\n"):
            while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                end += len(rest)
            end += len(rest)
            yield start, None
        else:
            yield start, line


def _lines(file: IO[bytes], start: int = 0) -> Iterator[tuple[int, bytes | None]]:
    for offset, line in physical_lines(file):
        if line is not None and offset == start == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise OSError("its text is UTF-16; convert it to UTF-8")
        if line is None or line.strip(b" \t\r\n\v\f\xef\xbb\xbf"):
            yield offset, line


def _parse(line: bytes | None) -> ParsedRow:
    if line is None:
        return None, f"a line of more than {_MAX_LINE_BYTES} bytes; keep images in images/ or in Parquet"
    return parse_object(line, "a line of JSON")


def storable_name(name: str) -> str:
    """A name that can be written: one half of a surrogate pair is shown as its escape."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def _unique(pairs: list[tuple[str, Any]]) -> RawRecord:
    record = {storable_name(name): value for name, value in pairs}
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} stands twice in one object")
    return record
