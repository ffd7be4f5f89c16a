"""The rows of an output of ``crem embed`` that count: what every reader of vectors reads.

An output that was grown (``crem embed --grow``) has parts of several runs, and rows of files that have changed or are
gone since. Such rows stay in their parts, and ``gone-*.parquet`` lists them as ranges. ``live_parts`` gives the parts
that belong to the output with the ranges of each, and ``LivePart.keep`` leaves them out of a table that was read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from crem.errors import ConfigError
from pipelines.embedding.output import parts_of, read_ledgers
from pipelines.tables.json_file import JsonFile
from pipelines.tables.manifest import PartFile
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage
from pipelines.tables.vector_parts import read_part

__all__ = [
    "GENERATION",
    "GONE",
    "Generation",
    "Growth",
    "LivePart",
    "every_gone",
    "generation_parts",
    "gone_failed",
    "live_parts",
    "live_parts_of",
    "read_gone",
]

GENERATION = "generation-"
"""How the folder of a growth begins."""
GONE = pa.schema([("part", pa.string()), ("first", pa.int64()), ("rows", pa.int64())])
"""Ranges of rows that are gone, in the order of parts and rows; names of parts are paths from the output."""
_NONE = np.empty((0, 2), np.int64)


class Generation(BaseModel):
    """A run that added to an output, and what of its rows is gone since."""

    model_config = ConfigDict(frozen=True)

    number: int
    folder: str
    """Path of its output from the whole; empty for the first."""
    rows: int
    failed: dict[str, int]
    """Rows with an error, by reason."""
    gone: int = 0
    """Rows that are gone."""
    gone_failed: dict[str, int] = {}
    """Those of ``failed`` that are."""


class Growth(JsonFile):
    """The state of an output that was grown: ``rows == embedded + sum(failed)``, of live rows.

    Written in one piece when a generation is complete; until then readers see the state before.
    """

    FILE: ClassVar[str] = "growth.json"

    identity: str
    """Of the input."""
    fingerprint: str
    generations: tuple[Generation, ...]
    last: int
    """Highest number of a generation so far."""
    rows: int
    embedded: int
    failed: dict[str, int]
    gone: int
    """Rows in parts that count no more."""
    repeated_ids: int
    gone_file: str
    """Table of ``GONE``."""
    present_file: str
    """Table of the files of the input whose rows these are."""


@dataclass(frozen=True)
class LivePart:
    """A part, and which of its rows count."""

    file: PartFile
    """Its name is a path from the output."""
    gone: NDArray[np.int64] = field(default_factory=_NONE.copy)
    """[ranges, 2] first row and number of rows; ascending"""

    @property
    def rows(self) -> int:
        """Rows that count."""
        return self.file.rows - int(self.gone[:, 1].sum())

    @property
    def state(self) -> str:
        """Another string when other bytes or other rows count."""
        if not len(self.gone):
            return self.file.checksum
        return f"{self.file.checksum}-{hashlib.blake2b(self.gone.tobytes(), digest_size=8).hexdigest()}"

    def is_live(self, first: int, rows: int) -> NDArray[np.bool_]:
        """Whether each of ``rows`` rows from ``first`` on counts."""
        live = np.ones(rows, np.bool_)
        for start, count in self.gone:
            live[max(0, start - first) : max(0, start + count - first)] = False
        return live

    def keep(self, table: pa.Table, first: int = 0) -> pa.Table:
        """The rows that count, of a table that was read from row ``first`` of the part on."""
        return table.filter(pa.array(self.is_live(first, len(table)))) if len(self.gone) else table


def live_parts(output: Folder) -> list[LivePart]:
    """All parts of an output that have a row that counts, in order.

    Raises:
        ConfigError: a ledger or the table of rows that are gone is damaged.
    """
    growth = Growth.read(output)
    if growth is None:
        return [LivePart(part) for part in parts_of(read_ledgers(output))]
    return live_parts_of(output, growth)


def live_parts_of(output: Folder, growth: Growth) -> list[LivePart]:
    """The parts of a state that an output has, or is to have. Raises as ``live_parts`` does."""
    gone = read_gone(output, growth)
    parts = [part for generation in growth.generations for part in generation_parts(output, generation)]
    found = [LivePart(part, gone.get(part.name, _NONE)) for part in parts]
    return [part for part in found if part.rows]


def generation_parts(output: Folder, generation: Generation) -> list[PartFile]:
    """The parts of a generation, in order; their names are paths from the output."""
    if not generation.folder:
        return parts_of(read_ledgers(output))
    parts = parts_of(read_ledgers(output.child(generation.folder)))
    return [part.model_copy(update={"name": f"{generation.folder}/{part.name}"}) for part in parts]


def every_gone(output: Folder, growth: Growth) -> list[LivePart]:
    """The parts with rows that are gone, also those of which nothing else is left."""
    gone = read_gone(output, growth)
    parts = [part for generation in growth.generations for part in generation_parts(output, generation)]
    return [LivePart(part, gone[part.name]) for part in parts if part.name in gone]


def read_gone(output: Folder, growth: Growth) -> dict[str, NDArray[np.int64]]:
    """Ranges of rows that are gone, by part."""
    try:
        table = pq.read_table(pa.BufferReader(output.read_bytes(growth.gone_file)), schema=GONE)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise ConfigError(
            f"{output.uri}/{growth.gone_file}, the list of rows that are gone, cannot be read: {error}; run crem embed "
            "--fresh"
        ) from error
    parts = table["part"].combine_chunks().dictionary_encode()
    ranges = np.stack([table["first"].to_numpy(), table["rows"].to_numpy()], axis=1).astype(np.int64)
    order = np.argsort(codes := parts.indices.to_numpy(), kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(parts.dictionary) + 1))
    names = parts.dictionary.to_pylist()
    return {name: ranges[order[bounds[i] : bounds[i + 1]]] for i, name in enumerate(names)}


def gone_failed(part: LivePart, *, folder: Folder) -> dict[str, int]:
    """In a worker: rows with an error among those that are gone, by reason."""
    read = partial(read_part, folder, part.file.name, ["error"])
    errors = require_storage(f"reading {folder.uri}/{part.file.name}", read)["error"]
    gone = errors.filter(pa.array(~part.is_live(0, len(errors)))).drop_null()
    return dict(Counter(error.partition(":")[0] for error in gone.to_pylist()))
