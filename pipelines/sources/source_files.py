"""The files of a corpus: as a table, because there may be a million of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from pipelines.sources.input_file import InputFile
from pipelines.sources.records import Ignored
from pipelines.tables.storage import Folder

__all__ = ["FILES", "SourceFiles"]

FILES = pa.schema([("name", pa.string()), ("size", pa.int64()), ("version", pa.string()), ("container", pa.string())])
"""One row a file."""


@dataclass(frozen=True, eq=False)
class SourceFiles:
    """The row files of a corpus or item table, in the order of their names, and what else is there."""

    root: Folder
    """Where relative image names start."""
    folder: Folder
    """The folder of the row files."""
    table: pa.Table
    """The row files, as ``FILES``. Names are paths from ``folder``."""
    ignored: tuple[Ignored, ...] = ()
    """What is in ``root`` and is not read, the unexpected first."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All names, for a caller that needs them at once."""
        return tuple(self.table["name"].to_pylist())

    def some_names(self, most: int) -> tuple[str, ...]:
        """Names of at most so many files, spread over all."""
        return tuple(self.table["name"].take(pa.array(range(0, len(self), max(1, -(-len(self) // most))))).to_pylist())

    @property
    def archives(self) -> tuple[str, ...]:
        """The first few zip archives that were seen anywhere in ``root``."""
        return tuple(name for ignored in self.ignored if ignored.kind == "archives" for name in ignored.names)

    def chunk(self, start: int, stop: int) -> SourceFiles:
        """Some of the files, for a task that splits them."""
        return SourceFiles(self.root, self.folder, pa.table(self.table.slice(start, stop - start).to_pydict(), FILES))

    def files(self) -> Iterator[InputFile]:
        """The files, one at a time."""
        for batch in self.table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield InputFile(self.folder.uri, row["name"], row["container"], row["size"], row["version"])
