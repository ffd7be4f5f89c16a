"""What a container is: a way in which files hold rows, whatever the rows mean.

A container is one small module with one object of this protocol; ``known_containers`` lists them. It never raises for a
row that is bad: it gives ``(None, why)`` for it, because the other rows of the file are good.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from pipelines.sources.input_file import InputFile
from pipelines.sources.records import FileSchema, FileStamp, ParsedRow, RowRange

__all__ = ["Container", "FolderContainer"]


class Container(Protocol):
    """A kind of file."""

    name: str
    """As ``RowRange.container`` and ``crem inspect`` name it."""
    title: str
    """As people call it."""
    suffixes: tuple[str, ...]
    """Ends of file names, in lower case."""

    def split(self, file: InputFile, rows: int) -> Iterator[RowRange]:
        """Ranges of at most about ``rows`` rows, in order; together they hold every row of the file.

        Raises:
            ConfigError: the file is damaged or is no table.
            StorageError: the storage fails.
        """

    def read(self, rows: RowRange, columns: Sequence[str] | None) -> Iterator[ParsedRow]:
        """The rows of a range in order, a few at a time in memory, with at least those of ``columns`` that there are.

        Raises: as ``split``.
        """

    def schema(self, file: InputFile) -> FileSchema:
        """What the file says of its columns. Raises as ``split``."""


@runtime_checkable
class FolderContainer(Protocol):
    """A container whose "file" is a folder, and which therefore knows itself what identifies it."""

    def stamp(self, file: InputFile) -> FileStamp:
        """As it is now."""

    def fingerprint(self, file: InputFile) -> str:
        """Of its content: 16 hexadecimal digits."""
