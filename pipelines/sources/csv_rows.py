"""Tables of text (CSV, TSV), plain or compressed; the first line names the columns, and every value is text.

CC3M and CC12M have no such line: two columns, of which one is an address, are ``caption`` and ``url``.

Python's ``csv`` parses a record; PyArrow's reader stops at the first record it does not like, and both swallow rows
where a quote is never closed. Here such a quote costs one row: a record that does not close, or whose number of fields
is wrong although it closes, is given up at its first line, and reading goes on at its second. Counting the rows takes
one pass over the file.
"""

from __future__ import annotations

import csv
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import IO

from crem.errors import ConfigError
from pipelines.sources.compression import COMPRESSIONS, STREAM_ERRORS, decompressed, is_compressed, without_compression
from pipelines.sources.input_file import InputFile
from pipelines.sources.jsonl_rows import COMPRESSED_RANGE_ROWS, physical_lines
from pipelines.sources.records import FileSchema, ParsedRow, RowRange, unreadable_file

__all__ = ["CsvRows"]

_MAX_RECORD_BYTES = 64 * 2**20
_MAX_RECORD_LINES = 10_000
_MAX_TRIES = 8
"""Quotes that may seem to close a record and do not, so that a damaged file does not cost the square of its size."""
_DELIMITERS = (",", "\t", ";", "|")
_SNIFFED_LINES = 20
_SNIFFED_BYTES = 256 * 2**10
_ROW_LIKE = ("http://", "https://", "s3://", "data:")
_LONGEST_NAME = 200
_BOM = b"\xef\xbb\xbf"


class CsvRows:
    """Comma- or tab-separated values."""

    name = "csv"
    title = "CSV or TSV"
    suffixes: tuple[str, ...] = tuple(s + c for s in (".csv", ".tsv") for c in COMPRESSIONS)

    def split(self, file: InputFile, rows: int) -> Iterator[RowRange]:
        size = max(rows, COMPRESSED_RANGE_ROWS) if is_compressed(file.name) else rows
        start = count = 0
        for offset, _ in _records(file, _header(file).end):
            if count and count % size == 0:
                yield file.range(count - size, size, offset=start, end=offset)
            if count % size == 0:
                start = offset
            count += 1
        if count:
            last = (count - 1) // size * size
            yield file.range(last, count - last, offset=start)

    def read(self, rows: RowRange, columns: Sequence[str] | None) -> Iterator[ParsedRow]:
        for _, parsed in islice(_records(InputFile.of(rows), rows.offset, rows.end), rows.rows):
            yield parsed

    def schema(self, file: InputFile) -> FileSchema:
        return FileSchema(_header(file).names)


@dataclass(frozen=True)
class _Header:
    names: tuple[str, ...]
    delimiter: str
    end: int
    """Byte at which the rows begin."""


@lru_cache(maxsize=64)
def _header(file: InputFile) -> _Header:
    """The first record of a file.

    Raises:
        ConfigError: it is no header.
    """
    try:
        with decompressed(file, 0, _SNIFFED_BYTES) as stream:
            lines = [line for _, line in islice(physical_lines(stream, _MAX_RECORD_BYTES), _SNIFFED_LINES)]
    except STREAM_ERRORS as error:
        raise unreadable_file(file.folder, file.name, error) from error
    if any(line is None for line in lines[:1]):
        raise unreadable_file(file.folder, file.name, f"its first line has more than {_MAX_RECORD_BYTES} bytes")
    if lines and lines[0] is not None and lines[0].startswith((b"\xff\xfe", b"\xfe\xff")):
        raise unreadable_file(file.folder, file.name, "its text is UTF-16; convert it to UTF-8")
    texts = [line.decode("utf-8", "surrogateescape") for line in lines if line is not None]
    texts[:1] = [text.removeprefix("\ufeff") for text in texts[:1]]
    blank = next((i for i, text in enumerate(texts) if text.strip()), len(texts))
    if blank == len(texts):
        return _Header((), ",", file.size)
    preferred = "\t" if without_compression(file.name).lower().endswith(".tsv") else ","
    delimiter = _delimiter(texts[blank:], preferred)
    first = texts[blank].rstrip("\r\n")
    if "\r" in first and '"' not in first:
        raise unreadable_file(
            file.folder, file.name, "its lines end with a carriage return alone; end them with a line feed"
        )
    if delimiter == "\t" and (pair := _pair_without_header(first.split(delimiter))):  # a quote there is a character
        return _Header(pair, delimiter, _before_first(lines))
    text, used = texts[blank], blank + 1
    while (names := _fields_or_none(text, delimiter)) is None and used < len(texts):
        text, used = text + texts[used], used + 1
    if names is None:
        raise unreadable_file(
            file.folder, file.name, f"its first line {text[:80]!r} is no header; its quotes do not match"
        )
    if pair := _pair_without_header(names):
        return _Header(pair, delimiter, _before_first(lines))
    end = sum(len(line or b"") for line in lines[:used])
    return _Header(_column_names(file, [name.strip() for name in names]), delimiter, end)


def _before_first(lines: list[bytes | None]) -> int:
    return len(_BOM) if (lines[0] or b"").startswith(_BOM) else 0


def _pair_without_header(names: list[str]) -> tuple[str, ...]:
    """The columns of CC3M and CC12M, which have no header: a caption and an address, in either order; else none."""
    addresses = [name.strip().lower().startswith(("http://", "https://")) for name in names]
    if len(names) != 2 or sum(addresses) != 1:
        return ()
    return tuple("url" if address else "caption" for address in addresses)


def _column_names(file: InputFile, names: list[str]) -> tuple[str, ...]:
    rowlike = [
        n for n in names if n.lower().startswith(_ROW_LIKE) or len(n) > _LONGEST_NAME or "\udc80" <= n[:1] <= "\udcff"
    ]
    if rowlike:
        raise ConfigError(
            f"{file.uri} begins with {rowlike[0][:80]!r}, which is no name of a column; put a line with the names of "
            "the columns first"
        )
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]  # as pandas calls the column of an index
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{file.uri} has several columns of one name, {twice}; rename all but one of each")
    return tuple(names)


def _delimiter(lines: list[str], preferred: str) -> str:
    """The delimiter by which most of the first lines have as many fields as the header, and more than one."""

    def score(delimiter: str) -> tuple[int, int, bool]:
        counts = [len(_fields_or_none(line, delimiter) or ()) for line in lines]
        if counts[0] < 2:
            return (0, 0, delimiter == preferred)
        return (counts.count(counts[0]), counts[0], delimiter == preferred)

    if preferred == "\t" and len(_fields_or_none(lines[0], preferred) or ()) > 1:
        return preferred
    return max(_DELIMITERS, key=score)


def _fields(text: str, delimiter: str) -> list[str] | None:
    """The fields of one record; ``None`` where a quote is still open at its end.

    Raises:
        csv.Error: it is no record.
    """
    if '"' not in text:
        return text.rstrip("\r\n").split(delimiter)
    csv.field_size_limit(_MAX_RECORD_BYTES)
    try:
        records = list(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None
        raise
    if len(records) != 1:
        raise csv.Error(f"{len(records)} records in one")
    return records[0]


def _fields_or_none(text: str, delimiter: str) -> list[str] | None:
    try:
        return _fields(text, delimiter)
    except csv.Error:
        return None


def _records(file: InputFile, start: int, end: int = 0) -> Iterator[tuple[int, ParsedRow]]:
    """(byte offset, row) of every record from ``start`` on."""
    header = _header(file)
    try:
        with decompressed(file, start, end) as stream:
            lines = _Lines(stream, start)
            while (item := lines.next()) is not None:
                offset, line = item
                if line is None:
                    yield offset, (None, f"a line of more than {_MAX_RECORD_BYTES} bytes")
                elif line.strip(b"\r\n\xef\xbb\xbf"):
                    yield offset, _record(line, lines, header)
    except STREAM_ERRORS as error:
        raise unreadable_file(file.folder, file.name, error) from error


class _Lines:
    """Physical lines that can be given back."""

    def __init__(self, stream: IO[bytes], start: int):
        self._lines = physical_lines(stream, _MAX_RECORD_BYTES)
        self._start = start
        self._back: deque[tuple[int, bytes | None]] = deque()

    def next(self) -> tuple[int, bytes | None] | None:
        if self._back:
            return self._back.popleft()
        item = next(self._lines, None)
        return None if item is None else (self._start + item[0], item[1])

    def give_back(self, items: list[tuple[int, bytes | None]]) -> None:
        self._back.extendleft(reversed(items))


def _record(line: bytes, lines: _Lines, header: _Header) -> ParsedRow:
    """The record that begins with ``line``; takes from ``lines`` only what belongs to it."""
    first = line.decode("utf-8", "surrogateescape")
    taken: list[tuple[int, bytes | None]] = []
    text, size, quotes, tries, why = first, len(line), line.count(b'"'), 0, "a quote that is never closed"
    try:
        fields = _fields(text, header.delimiter)
        while fields is None and len(taken) < _MAX_RECORD_LINES and size < _MAX_RECORD_BYTES and tries < _MAX_TRIES:
            item = lines.next()
            if item is None or item[1] is None:
                taken += [item] if item else []
                break
            taken.append(item)
            size, quotes = size + len(item[1]), quotes + item[1].count(b'"')
            if b'"' in item[1] and quotes % 2 == 0:  # only then can it be closed
                text = (line + b"".join(more or b"" for _, more in taken)).decode("utf-8", "surrogateescape")
                fields, tries = _fields(text, header.delimiter), tries + 1
    except csv.Error as error:
        fields, why = None, str(error)
    each_alone = bool(taken) and header.delimiter == "\t" and _all_are_records(line, taken, header)
    if fields is None or each_alone or (taken and len(fields) != len(header.names)):
        lines.give_back(taken)
        literal = first.rstrip("\r\n").split(header.delimiter)
        if header.delimiter != "\t" or len(literal) != len(header.names):
            return None, f"not a record of CSV: {why if fields is None else _ragged(fields, header)}: {first[:60]!r}"
        fields = literal  # in most TSV files a quote is only a character
    if len(fields) != len(header.names):
        return None, f"{_ragged(fields, header)}: {first[:60]!r}"
    if not text.isascii() and any("\udc80" <= c <= "\udcff" for field in fields for c in field):
        return None, f"text that is not UTF-8: {line[:60]!r}"
    return dict(zip(header.names, fields, strict=True)), ""


def _all_are_records(line: bytes, more: list[tuple[int, bytes | None]], header: _Header) -> bool:
    """Whether each line has all fields by itself, so that its quotes are only characters."""
    lines = [line, *(found or b"" for _, found in more)]
    between = len(header.names) - 1
    return between > 0 and all(found.count(header.delimiter.encode()) == between for found in lines)


def _ragged(fields: list[str], header: _Header) -> str:
    return f"{len(fields)} fields where the header has {len(header.names)}"
