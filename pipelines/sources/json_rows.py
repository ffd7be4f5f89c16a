"""JSON documents: a list of objects, an object that holds one, or captions of COCO. Some files are JSON lines.

A document is read by ranges of its bytes, in memory of a range's rows, however large it is. Counting the rows takes one
pass. COCO keeps its annotations and its images in two lists: a row is an annotation with what its image has besides
(``file_name``, ``coco_url`` …), and a range looks up only the images of its own annotations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import IO, Any

from crem.errors import ConfigError
from pipelines.sources.compression import COMPRESSIONS, STREAM_ERRORS, decompressed, is_compressed
from pipelines.sources.input_file import InputFile
from pipelines.sources.json_scanner import JsonScanner, JsonValue
from pipelines.sources.jsonl_rows import COMPRESSED_RANGE_ROWS, JsonlRows
from pipelines.sources.records import FileSchema, ParsedRow, RawRecord, RowRange, unreadable_file

__all__ = ["JsonRows"]

_JOINED_RANGE_ROWS = 16_384
"""A range of COCO reads the whole list of images, so there are few."""
_SNIFFED_ROWS = 100
_SNIFFED_BYTES = 64 * 2**20
_BESIDE = ("licenses", "categories", "info")
"""Lists that describe a document and are no rows."""


class JsonRows:
    """A JSON document."""

    name = "json"
    title = "JSON"
    suffixes: tuple[str, ...] = tuple(f".json{c}" for c in COMPRESSIONS)
    _lines = JsonlRows()

    def split(self, file: InputFile, rows: int) -> Iterator[RowRange]:
        if _is_lines(file):
            yield from self._lines.split(file, rows)
            return
        size = max(rows, COMPRESSED_RANGE_ROWS) if is_compressed(file.name) else rows
        if _is_list(file):
            yield from _split_list(file, size)
            return
        table = _table(file, size)
        joined = table.images is not None and size < _JOINED_RANGE_ROWS
        step = _JOINED_RANGE_ROWS // size if joined else 1
        aside = -1 if table.images is None else table.images.offset
        for i in range(0, len(table.rows.starts), step):
            first = i * size
            yield file.range(
                first,
                min(step * size, table.rows.count - first),
                offset=table.rows.starts[i],
                aside=aside,
                within=table.name,
            )

    def read(self, rows: RowRange, columns: Sequence[str] | None) -> Iterator[ParsedRow]:
        file = InputFile.of(rows)
        if _is_lines(file):
            yield from self._lines.read(rows, columns)
            return
        with _scanner(file, rows.offset, rows.end) as scanner:
            values = islice(scanner.rest_of_list(), rows.rows)
            if rows.aside < 0:
                for value in values:
                    yield _row(value)
                return
            annotations = list(values)
        yield from _joined(file, annotations, rows.aside)

    def schema(self, file: InputFile) -> FileSchema:
        if _is_lines(file):
            return self._lines.schema(file)
        first = next(self.split(file, _SNIFFED_ROWS), None)
        records = [] if first is None else [record for record, _ in islice(self.read(first, None), _SNIFFED_ROWS)]
        return FileSchema(tuple(dict.fromkeys(name for record in records if record for name in record)))


@dataclass
class _List:
    """A list of objects in a document."""

    offset: int
    """Byte of its first value."""
    count: int = 0
    objects: int = 0
    starts: list[int] = field(default_factory=list)
    """Bytes of the first value of each range."""


@dataclass(frozen=True)
class _Table:
    name: str
    """Of the list of rows."""
    rows: _List
    images: _List | None = None
    """COCO: what the rows refer to."""


@contextmanager
def _scanner(file: InputFile, offset: int = 0, end: int = 0) -> Iterator[JsonScanner]:
    try:
        with decompressed(file, offset, end) as stream:
            yield JsonScanner(stream, offset)
    except (ValueError, *STREAM_ERRORS) as error:
        raise unreadable_file(file.folder, file.name, error) from error


@lru_cache(maxsize=64)
def _is_lines(file: InputFile) -> bool:
    """Whether a first object is followed by another, as in JSON lines and in no document."""
    with _scanner(file) as scanner:
        if scanner.peek() != "{":
            return False
    with decompressed(file) as stream:
        first = stream.readline(_SNIFFED_BYTES)
        while first and not first.strip(b" \t\r\n\xef\xbb\xbf"):
            first = stream.readline(_SNIFFED_BYTES)
        if not first.rstrip().endswith(b"}"):
            return False
        return _follows(stream)


def _follows(stream: IO[bytes]) -> bool:
    while line := stream.readline(_SNIFFED_BYTES):
        if line.strip():
            return line.lstrip().startswith(b"{")
    return False


def _is_list(file: InputFile) -> bool:
    with _scanner(file) as scanner:
        return scanner.peek() == "["


def _split_list(file: InputFile, size: int) -> Iterator[RowRange]:
    """The ranges of a document that is a list, as they come."""
    count = start = objects = 0
    with _scanner(file) as scanner:
        scanner.skip("[")
        for value in scanner.rest_of_list():
            if count and count % size == 0:
                yield file.range(count - size, size, offset=start, end=value.offset)
            if count % size == 0:
                start = value.offset
            count += 1
            objects += isinstance(value.value, dict)
        scanner.require_end()
        if count and not objects:
            raise ValueError("it is a list, but not of objects")
    if count:
        last = (count - 1) // size * size
        yield file.range(last, count - last, offset=start)


def _table(file: InputFile, size: int) -> _Table:
    """Where the rows are in a document that is an object; reads all of it.

    Raises:
        ConfigError: it is damaged, or holds no list of objects, or several of which none is known to be the rows.
    """
    with _scanner(file) as scanner:
        lists: dict[str, _List] = {}
        scanner.skip("{")
        for name in scanner.names():
            if scanner.peek() != "[":
                scanner.value()
            elif name in lists:
                raise ValueError(f"byte {scanner.offset}: {name!r} stands twice in the document")
            else:
                lists[name] = _walk_list(scanner, size)
        scanner.require_end()
    lists = {name: found for name, found in lists.items() if found.objects} or {
        name: found for name, found in lists.items() if not found.count
    }
    if "annotations" in lists and "images" in lists:
        return _Table("annotations", lists["annotations"], lists["images"])
    rows_of = {name: found for name, found in lists.items() if name not in _BESIDE} or lists
    if len(rows_of) > 1:
        rows_of = {name: rows_of[name] for name in ("data", "rows") if name in rows_of} or rows_of
    if len(rows_of) != 1:
        what = f"several lists of objects, {list(rows_of)}" if rows_of else "one object and no list of objects"
        raise ConfigError(
            f"{file.uri} holds {what}, so it does not say what its rows are; write a list of objects, or name the "
            "files of rows by a pattern, such as 'FOLDER/train*.json'"
        )
    return _Table(*next(iter(rows_of.items())))


def _walk_list(scanner: JsonScanner, size: int) -> _List:
    """Pass over a list."""
    scanner.skip("[")
    found = _List(scanner.offset)
    for value in scanner.rest_of_list():
        if found.count == 0:
            found.offset = value.offset
        if found.count % size == 0:
            found.starts.append(value.offset)
        found.count += 1
        found.objects += isinstance(value.value, dict)
    return found


def _row(value: JsonValue) -> ParsedRow:
    if value.problem:
        return None, value.problem
    if not isinstance(value.value, dict):
        return None, f"a JSON {type(value.value).__name__}, not an object: {repr(value.value)[:60]}"
    return value.value, ""


def _joined(file: InputFile, annotations: list[JsonValue], images_at: int) -> Iterator[ParsedRow]:
    """Annotations of COCO with their images."""
    wanted = {_image_id(value.value) for value in annotations}
    images: dict[str, RawRecord | None] = {}
    with _scanner(file, images_at) as scanner:
        for value in scanner.rest_of_list():
            image, _ = _row(value)
            if image is not None and (key := repr(image.get("id"))) in wanted:
                images[key] = image if images.get(key, image) == image else None
    for value in annotations:
        record, why = _row(value)
        image = None if record is None else images.get(_image_id(record))
        if record is None:
            yield None, why
        elif image is None:
            known = "stands twice" if _image_id(record) in images else "is missing"
            yield None, f"image_id {_image_id(record)[:60]} {known} among the images of the file"
        else:
            yield {**image, **record}, ""


def _image_id(annotation: Any) -> str:
    return repr(annotation.get("image_id")) if isinstance(annotation, dict) else ""
