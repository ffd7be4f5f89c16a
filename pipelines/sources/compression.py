"""Compressed streams: gzip, bzip2 and xz by Python's library, zstandard by PyArrow (which reads several frames)."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import IO, Any

import pyarrow as pa

from pipelines.sources.input_file import InputFile

__all__ = ["COMPRESSIONS", "STREAM_ERRORS", "decompressed", "is_compressed", "without_compression"]

COMPRESSIONS = ("", ".gz", ".zst", ".bz2", ".xz")
"""What may follow the suffix of a file of text."""
STREAM_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What a damaged stream raises. Failures of the storage are ``CremError`` and none of these."""
_BUFFER_BYTES = 2**20


def is_compressed(name: str) -> bool:
    """Whether the name says so."""
    return name.lower().endswith((*COMPRESSIONS[1:], ".tgz"))


def without_compression(name: str) -> str:
    """The name without the suffix of the compression."""
    return name[: name.rindex(".")] if is_compressed(name) else name


def decompressed(file: InputFile, offset: int = 0, end: int = 0) -> IO[bytes]:
    """A stream of the file's content from a byte of it; a compressed one is decompressed from its start."""
    suffix = file.name.lower().rpartition(".")[2]
    if not is_compressed(file.name):
        return file.open(offset, end)
    source = file.open()
    stream: IO[bytes]
    if suffix in ("gz", "tgz"):
        stream = gzip.GzipFile(fileobj=source)  # type: ignore[assignment]
    elif suffix == "bz2":
        stream = bz2.BZ2File(source)  # type: ignore[assignment]
    elif suffix == "xz":
        stream = lzma.LZMAFile(source)  # noqa: SIM115
    else:
        stream = _ZstdStream(source)  # type: ignore[assignment]
    content = io.BufferedReader(stream, _BUFFER_BYTES)  # type: ignore[type-var, arg-type]
    while offset and (passed := len(content.read(min(offset, _BUFFER_BYTES)))):
        offset -= passed
    return content


class _ZstdStream(io.RawIOBase):
    """Arrow's stream as Python's, so that it can be read by lines."""

    def __init__(self, source: IO[bytes]):
        super().__init__()
        self._stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return int(self._stream.readinto(buffer))  # its read() leaks what it has allocated when the stream is damaged
