"""Members of zip archives, read by ranges: one request for a member, and an archive's directory once per process.

The directory is kept as arrays of about 40 bytes a member, where ``zipfile`` keeps some 600: MMEB-train has 1.5 million
images. Names are looked up by a hash of 64 bits of their NFC form. Decompression and checksums are ``zipfile``'s.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import struct
import threading
import unicodedata
import zipfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import fsspec
import numpy as np

from crem.config import ImageConfig
from crem.errors import ItemError, shortened
from pipelines.tables.storage import Folder

__all__ = ["ZipArchive", "opened"]

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_CHUNK = 8 << 20
_SLACK = 1024
"""Bytes read beyond a member's data, for the name and the extra fields before it."""
_UTF8 = 0x800
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class ZipArchive:
    """An archive in the folder of a corpus."""

    root: str
    """URI of the corpus."""
    name: str
    """Path of the archive in it."""
    size: int
    """Bytes; an archive that was written anew is read anew."""

    @property
    def stem(self) -> str:
        return posixpath.basename(self.name).rpartition(".")[0]

    def check(self) -> None:
        """Refuse a file that is not a whole zip archive.

        Raises:
            zipfile.BadZipFile: it has no directory.
        """
        _find_directory(*self._place(), self.size)

    def find(self, name: str) -> int | None:
        """The number of a member, or ``None``."""
        return _directory(self).find(name)

    def read(self, number: int, name: str, limits: ImageConfig) -> bytes:
        """The bytes of member ``number``.

        Raises:
            ItemError: ``image_too_large`` or ``image_corrupt``.
        """
        directory = _directory(self)
        info = directory.info(number)
        shown = f"{shortened(name, 120)!r} in {shortened(self.name, 60)}"
        if max(info.file_size, info.compress_size) > limits.max_source_bytes:
            raise ItemError(
                "image_too_large",
                f"{shown} unpacks to {info.file_size} bytes; the limit is {limits.max_source_bytes}; "
                "shrink it or raise model.image.max_source_bytes",
            )
        if info.flag_bits & _ENCRYPTED:
            raise ItemError("image_corrupt", f"{shown} is encrypted; write the archive without a password")
        fs, path = self._place()
        start = info.header_offset
        data = _range(fs, path, start, min(self.size, start + _LOCAL.size + _SLACK + info.compress_size))
        try:
            header = _LOCAL.unpack_from(data)
            if header[0] != b"PK\x03\x04":
                raise zipfile.BadZipFile("its header is not where the directory says")
            begin = _LOCAL.size + header[9] + header[10]
            if len(data) < begin + info.compress_size:
                data = _range(fs, path, start, start + begin + info.compress_size)
            member = zipfile.ZipExtFile(io.BytesIO(data[begin : begin + info.compress_size]), "r", info)
            return member.read(limits.max_source_bytes + 1)
        except (zipfile.BadZipFile, struct.error, EOFError, ValueError, OSError) as error:
            raise ItemError("image_corrupt", f"{shown} is damaged: {shortened(str(error), 80)}") from error
        except Exception as error:  # of zlib, bz2 and lzma; of a compression that zipfile does not know
            raise ItemError("image_corrupt", f"{shown}: {shortened(str(error), 80)}") from error

    def _place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        folder = opened(self.root)
        return folder.fs, folder.path(self.name)


@lru_cache(maxsize=16)
def opened(uri: str) -> Folder:
    """A folder, whose connection this process keeps."""
    return Folder(uri)


class _Directory:
    """The members of an archive."""

    def __init__(self, entries: Iterator[tuple[str, int, int, int, int, int, int]]):
        keys = array("Q")
        columns = [array(kind) for kind in "QQQLHH"]
        for name, *values in entries:
            if not name.endswith("/"):
                keys.append(_key(name))
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
        hashes = np.frombuffer(keys, np.uint64) if keys else np.empty(0, np.uint64)
        self._order = np.argsort(hashes, kind="stable")
        self._keys = hashes[self._order]
        self._columns = columns

    def find(self, name: str) -> int | None:
        key = np.uint64(_key(name))
        at = int(np.searchsorted(self._keys, key, side="right")) - 1  # the last of two members of one name
        return int(self._order[at]) if at >= 0 and self._keys[at] == key else None

    def info(self, number: int) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo("member")
        info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type, info.flag_bits = (
            column[number] for column in self._columns
        )
        return info


_directories: dict[ZipArchive, _Directory] = {}
_lock = threading.Lock()


def _directory(archive: ZipArchive) -> _Directory:
    with _lock:
        if archive not in _directories:
            _directories[archive] = _Directory(_entries(*archive._place(), archive.size))
        return _directories[archive]


def _key(name: str) -> int:
    plain = unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))
    digest = hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _find_directory(fs: fsspec.AbstractFileSystem, path: str, size: int) -> tuple[int, int, int]:
    """Where the directory starts, its length, and the bytes that stand before the archive."""
    tail_start = max(0, size - (1 << 16) - 256)
    tail = _range(fs, path, tail_start, size)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise zipfile.BadZipFile("it has no directory at its end")
    *_, length, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":
        end = tail_start + at - 20 - _END64.size
        record = _range(fs, path, end, end + _END64.size)
        if record[:4] != b"PK\x06\x06":
            raise zipfile.BadZipFile("its 64-bit directory is damaged")
        *_, length, start = _END64.unpack(record)
    before = end - length - start
    if before < 0:
        raise zipfile.BadZipFile("its directory is longer than the file")
    return start + before, length, before


def _entries(fs: fsspec.AbstractFileSystem, path: str, size: int) -> Iterator[tuple[str, int, int, int, int, int, int]]:
    """(name, offset of its header, packed size, size, CRC, compression, flags) of every member."""
    start, length, before = _find_directory(fs, path, size)
    data, at, read = b"", 0, 0
    while True:
        if len(data) - at < (1 << 18) and read < length:
            more = min(_CHUNK, length - read)
            data, at = data[at:] + _range(fs, path, start + read, start + read + more), 0
            read += more
        if at + _ENTRY.size > len(data):
            return
        fields = _ENTRY.unpack_from(data, at)
        if fields[0] != b"PK\x01\x02":
            raise zipfile.BadZipFile("an entry of its directory is damaged")
        flags, method, crc, packed, unpacked = fields[3], fields[4], fields[7], fields[8], fields[9]
        name_size, extra_size, comment_size, offset = fields[10], fields[11], fields[12], fields[16]
        at += _ENTRY.size
        raw, extra = data[at : at + name_size], data[at + name_size : at + name_size + extra_size]
        at += name_size + extra_size + comment_size
        if 0xFFFFFFFF in (packed, unpacked, offset):
            unpacked, packed, offset = _sizes_64(extra, unpacked, packed, offset)
        yield _member_name(raw, flags), offset + before, packed, unpacked, crc, method, flags


def _sizes_64(extra: bytes, *values: int) -> list[int]:
    """The values that are too large for 32 bits stand in an extra field, in this order."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 1:
            large = iter(struct.unpack_from(f"<{size // 8}Q", extra, 4))
            return [next(large, value) if value == 0xFFFFFFFF else value for value in values]
        extra = extra[4 + size :]
    return list(values)


def _member_name(raw: bytes, flags: int) -> str:
    """Many programs write UTF-8 without saying so."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("utf-8" if flags & _UTF8 else "cp437", errors="replace")


def _range(fs: fsspec.AbstractFileSystem, path: str, start: int, end: int) -> bytes:
    return bytes(fs.cat_file(path, start=start, end=end)) if end > start else b""
