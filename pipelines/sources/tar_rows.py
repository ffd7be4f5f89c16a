"""WebDataset: tar files whose members share a key with the other parts of a record. Plain tars are read by ranges.

A record is ``{"__key__": key, "<ext>": value}``: the key is the path up to the first dot of its last part, ``ext`` the
rest in lower case, as the library ``webdataset`` has it. Text, numbers of classes and JSON are parsed, other members
are bytes. The library itself is not used: it needs the members of a key side by side, takes a key that comes back for
a new record, skips members without a key in silence, and only reads from front to end.

Splitting walks the headers once. The rows of a range stand together in most tars, and the range is then walked again;
where they are scattered, an index of the headers is kept in each process.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any

from pipelines.sources.compression import COMPRESSIONS, STREAM_ERRORS, decompressed, is_compressed
from pipelines.sources.input_file import InputFile
from pipelines.sources.jsonl_rows import COMPRESSED_RANGE_ROWS, parse_json
from pipelines.sources.records import FileSchema, ParsedRow, RawRecord, RowRange, unreadable_file

__all__ = ["TarRows"]

_MAX_MEMBER_BYTES = 256 * 2**20
_HELD_BYTES = 64 * 2**20
"""A range up to this size is read once into memory, not once for the headers and again for the members."""
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_TEXT = ("txt", "text", "caption", "transcript")
_NUMBER = ("cls", "cls2", "class", "count", "index", "inx", "id")
_ERRORS = (tarfile.TarError, ValueError, *STREAM_ERRORS)
_SNIFFED_ROWS = 100


class TarRows:
    """A WebDataset."""

    name = "tar"
    title = "WebDataset"
    suffixes: tuple[str, ...] = (*(f".tar{c}" for c in COMPRESSIONS), ".tgz")

    def split(self, file: InputFile, rows: int) -> Iterator[RowRange]:
        size = max(rows, COMPRESSED_RANGE_ROWS // 16) if is_compressed(file.name) else rows
        keys = list(_index(file).values())
        for first in range(0, len(keys), size):
            part = keys[first : first + size]
            offset, end = min(s.members[0].offset for s in part), max(s.members[-1].end for s in part)
            inside = sum(member.end - member.offset for sample in part for member in sample.members)
            together = inside == end - offset
            yield file.range(first, len(part), skip=first, offset=offset, end=end if together else 0)

    def read(self, rows: RowRange, columns: Sequence[str] | None) -> Iterator[ParsedRow]:
        file = InputFile.of(rows)
        if not rows.end:
            samples = list(_index(file).values())[rows.skip : rows.skip + rows.rows]
            yield from _records(samples, _fetcher(file, samples), columns)
            return
        held = _held(file, rows.offset, rows.end) if rows.end - rows.offset <= _HELD_BYTES else None
        samples = list(_samples(_walk(file, rows.offset, rows.end, held)).values())
        yield from _records(samples, _fetcher(file, samples, held, rows.offset), columns)

    def schema(self, file: InputFile) -> FileSchema:
        samples: dict[str, _Sample] = {}
        for member in _walk(file):
            samples.setdefault(member.key, _Sample(member.key)).members.append(member)
            if len(samples) > _SNIFFED_ROWS:
                break
        extensions = dict.fromkeys(
            m.extension for s in list(samples.values())[:_SNIFFED_ROWS] for m in s.members if m.extension
        )
        return FileSchema(("__key__", *extensions) if samples else ())


@dataclass(frozen=True, slots=True)
class _Member:
    key: str
    extension: str
    """Empty where the name has no key, and ``key`` is the whole name."""
    offset: int
    """Byte of its first header."""
    data: int
    """Byte of its content."""
    size: int
    end: int
    """Byte of what comes next."""
    problem: str = ""
    """Why its content cannot be read."""


@dataclass(frozen=True, slots=True)
class _Sample:
    key: str
    members: list[_Member] = field(default_factory=list)
    """In the order of the file."""


@lru_cache(maxsize=2)
def _index(file: InputFile) -> dict[str, _Sample]:
    """The samples of a whole file by key, in the order in which they begin."""
    return _samples(_walk(file))


def _samples(members: Iterator[_Member]) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    for member in members:
        # the NUL keeps a member without a key from meeting a key of the same name
        samples.setdefault(member.key if member.extension else f"\0{member.key}", _Sample(member.key)).members.append(
            member
        )
    return samples


def _walk(file: InputFile, start: int = 0, stop: int = 0, held: bytes | None = None) -> Iterator[_Member]:
    """The files among the members that begin in ``start`` to ``stop`` (0: to the end).

    ``tarfile`` ends silently at a header that is damaged, and at the end of the first of several archives that were
    joined; here the one is an error and the other goes on.

    Args:
        held: the bytes from ``start`` to ``stop``, if they have been read.

    Raises:
        ConfigError: the archive is damaged.
    """
    length = stop if stop or is_compressed(file.name) else file.size
    try:
        with decompressed(file, start) if held is None else io.BytesIO(held) as stream:
            blocks = _Blocks(stream, start)
            while not stop or blocks.tell() < stop:
                archive = tarfile.TarFile(fileobj=blocks, mode="r", encoding="utf-8")  # type: ignore[arg-type]
                while (info := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                    if length and info.offset_data + info.size > length and info.isreg():
                        raise ValueError(f"its member {info.name!r} goes on after the end of the file")
                    if (info.isreg() or info.islnk()) and not _of_a_system(info.name):
                        yield _member(info, archive.offset)
                    if stop and archive.offset >= stop:
                        return
                if not blocks.skip_zeros():
                    return
    except _ERRORS as error:
        raise unreadable_file(file.folder, file.name, error) from error


class _Blocks:
    """A stream for ``tarfile`` that only goes forward, and knows the last block that was read."""

    def __init__(self, stream: IO[bytes], at: int):
        self._stream, self._at = stream, at
        self._last = b""
        self._back = b""

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> None:
        if offset < self._at:  # a size below zero
            raise ValueError(f"a member at byte {self._at} gives its size wrongly")
        self._back = b""
        if not isinstance(self._stream, io.BytesIO) and self._stream.seekable():
            self._stream.seek(offset)
            self._at = offset
        while self._at < offset and self.read(min(offset - self._at, 2**20)):
            pass

    def read(self, count: int) -> bytes:
        data, self._back = self._back[:count], self._back[count:]
        data += self._stream.read(count - len(data))
        self._last = data
        self._at += len(data)
        return data

    def skip_zeros(self) -> bool:
        """Pass over the zeros that end an archive; whether another one follows.

        Raises:
            ValueError: it did not end with zeros.
        """
        while self._last:
            if self._last.count(0) != len(self._last):
                if len(self._last) == tarfile.BLOCKSIZE and self._zeros:
                    self._back, self._at = self._last, self._at - tarfile.BLOCKSIZE
                    self._zeros = False
                    return True
                raise ValueError(f"the header of a member at byte {self._at - len(self._last)} is damaged")
            self._zeros = True
            self.read(tarfile.BLOCKSIZE)
        return False

    _zeros = False


def _member(info: tarfile.TarInfo, end: int) -> _Member:
    name = info.name.removeprefix("./")
    found = _KEY.fullmatch(name)
    key, extension = (found[1], found[2].lower()) if found else (name, "")
    problem = ""
    if info.islnk():
        problem = f"{name[:200]!r} is a link to {info.linkname[:200]!r}; pack the files themselves (--hard-dereference)"
    elif info.issparse():
        problem = f"{name[:200]!r} is a sparse file; pack it without --sparse"
    elif info.size > _MAX_MEMBER_BYTES:
        problem = f"{name[:200]!r} has {info.size} bytes; the limit is {_MAX_MEMBER_BYTES}"
    return _Member(key, extension, info.offset, info.offset_data, info.size, end, problem)


def _of_a_system(name: str) -> bool:
    return "__MACOSX/" in name or name.rpartition("/")[2].startswith(("._", ".DS_Store"))


def _held(file: InputFile, start: int, end: int) -> bytes:
    try:
        with decompressed(file, start) as stream:
            return stream.read(end - start)
    except _ERRORS as error:
        raise unreadable_file(file.folder, file.name, error) from error


_Fetch = Callable[[_Member], bytes]


def _fetcher(file: InputFile, samples: Sequence[_Sample], held: bytes | None = None, start: int = 0) -> _Fetch:
    """How the content of members is read: from memory, by ranges, or, if compressed, all of them in one pass."""
    if held is not None:
        return lambda member: held[member.data - start : member.data - start + member.size]
    if not is_compressed(file.name):
        raw = file.open_raw()
        return lambda member: raw.read_exactly(member.data, member.size)
    contents: dict[int, bytes] = {}
    members = sorted((m for s in samples for m in s.members if not m.problem), key=lambda m: m.data)
    try:
        with decompressed(file) as stream:
            blocks = _Blocks(stream, 0)
            for member in members:
                blocks.seek(member.data)
                contents[member.data] = blocks.read(member.size)
    except _ERRORS as error:
        raise unreadable_file(file.folder, file.name, error) from error
    return lambda member: contents.pop(member.data)


def _records(samples: Iterable[_Sample], fetch: _Fetch, columns: Sequence[str] | None) -> Iterator[ParsedRow]:
    for sample in samples:
        counts = Counter(member.extension for member in sample.members)
        twice = [extension for extension, count in counts.items() if count > 1]
        if "" in counts:
            yield None, f"the member {sample.key[:200]!r} belongs to no key: its name has no dot after a first letter"
        elif twice:
            yield (
                None,
                f"the member {f'{sample.key}.{twice[0]}'[:200]!r} stands {counts[twice[0]]} times in the archive",
            )
        else:
            yield _record(sample, fetch, columns)


def _record(sample: _Sample, fetch: _Fetch, columns: Sequence[str] | None) -> ParsedRow:
    record: RawRecord = {"__key__": sample.key}
    for member in sorted(sample.members, key=lambda member: _natural(member.extension)):  # 2.jpg, then 10.jpg
        if columns is not None and member.extension not in columns:
            continue
        if member.problem:
            return None, member.problem
        value, why = _value(member.extension, fetch(member))
        if why:
            return None, f"{sample.key[:200]}.{member.extension[:60]} is {why}"
        record[member.extension] = value
    return record, ""


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", text)]


def _value(extension: str, data: bytes) -> tuple[Any, str]:
    kind = extension.rpartition(".")[2]
    if kind in ("json", "jsn"):
        return parse_json(data, "JSON")
    if kind not in _TEXT and kind not in _NUMBER:
        return data, ""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: {error}"
    if kind in _NUMBER and text.strip().lstrip("-").isascii() and text.strip().lstrip("-").isdigit():
        return int(text) if len(text) < 20 else text.strip(), ""
    return text, ""
