"""A file that hashes what is written into it: the checksum of a part without reading the part again."""

from __future__ import annotations

import hashlib
import io
from typing import IO, Any

from pipelines.tables.manifest import PartFile

__all__ = ["HashingSink"]


class HashingSink(io.RawIOBase):
    """Passes on what is written, and hashes it."""

    def __init__(self, sink: IO[bytes]):
        super().__init__()
        self._sink, self._digest, self._position = sink, hashlib.blake2b(digest_size=16), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._sink.write(data)
        self._digest.update(data)
        self._position += len(data)
        return len(data)

    def part(self, table: str, name: str, rows: int) -> PartFile:
        """What was written."""
        return PartFile(table=table, name=name, rows=rows, bytes=self._position, checksum=self._digest.hexdigest())
