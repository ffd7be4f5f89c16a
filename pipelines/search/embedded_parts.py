"""What an output of ``crem embed`` holds: which parts, of which model, and the rows that can be searched.

``rows_of_part`` is the one reader of rows for an index: what it does not yield is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from crem.errors import ConfigError
from pipelines.embedding.live_parts import Growth, LivePart, live_parts
from pipelines.embedding.output import DATASET, PART_FOLDERS, EmbedManifest, EmbedPlan
from pipelines.tables.manifest import PartFile
from pipelines.tables.part_reads import in_threads
from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import StorageFault, require_storage, storage_fault
from pipelines.tables.vector_parts import PartFooter, checksum_of, open_part_rows, part_footer
from pipelines.tables.vector_types import unit_vectors, vector_columns

__all__ = ["EmbeddedPart", "EmbeddedParts", "rows_of_part", "survey"]

_BATCH_ROWS = 8192
_LEFT_OUT = ("error", "scale")
"""Columns of an output that its rows with a float32 vector do not need."""


@dataclass(frozen=True)
class EmbeddedPart:
    """A part by its content: two of one name and checksum have the same rows."""

    name: str
    checksum: str
    """``LivePart.state``: of the bytes, and of the rows that count."""
    rows: int
    """That count."""
    bytes: int
    gone: tuple[tuple[int, int], ...] = ()
    """Ranges of rows that do not."""

    @property
    def file_checksum(self) -> str:
        """Of the bytes alone."""
        return self.checksum.partition("-")[0]

    def keep(self, table: pa.Table, first: int = 0) -> pa.Table:
        """``LivePart.keep``."""
        file = PartFile(
            table="embeddings", name=self.name, rows=self.rows, bytes=self.bytes, checksum=self.file_checksum
        )
        return LivePart(file, np.array(self.gone, np.int64).reshape(-1, 2)).keep(table, first)


@dataclass(frozen=True)
class EmbeddedParts:
    """The parts of a complete output."""

    folder: Folder
    parts: tuple[EmbeddedPart, ...]
    stamp: EmbeddingStamp
    columns: pa.Schema
    """Of the rows that ``rows_of_part`` yields."""
    source: str | None
    """Where the items came from."""

    @property
    def rows(self) -> int:
        """Rows of all parts, those with an error among them."""
        return sum(part.rows for part in self.parts)


def survey(
    source: Folder, each: Callable[[Callable[[str], PartFooter], Iterable[str]], list[PartFooter]] = in_threads
) -> EmbeddedParts:
    """Look at an output of ``crem embed`` and at the footers of its parts.

    Args:
        each: how the footers are read, ``in_threads`` or ``ray_tasks.on_nodes``.

    Raises:
        ConfigError: there are no embeddings, their run did not finish, parts are missing or damaged, or several models
            made them.
    """
    manifest, plan, growth = EmbedManifest.read(source), EmbedPlan.read(source), Growth.read(source)
    listed = live_parts(source) if growth is not None or (manifest is not None and manifest.shards) else None
    names = [part.file.name for part in listed] if listed is not None else source.files(".parquet")
    above = Folder.at(source.uri.rpartition("/")[0] or "/")
    if plan is None and source.name in (*PART_FOLDERS.values(), DATASET) and EmbedPlan.read(above) is not None:
        raise ConfigError(
            f"{source.uri} is inside an output of crem embed, whose ledgers say what counts; give {above.uri}"
        )
    if not names and not source.exists(EmbedPlan.FILE):
        raise ConfigError(f"{source.uri} holds no Parquet files of embeddings; run crem embed into it first")
    if manifest is None and growth is None and source.exists(EmbedPlan.FILE):
        state = (
            f"whose {EmbedManifest.FILE} is damaged" if source.exists(EmbedManifest.FILE) else "that was not finished"
        )
        raise ConfigError(f"{source.uri} is an embedding run {state}; run crem embed into it again")
    footers = each(partial(_footer, source), names)
    stamp = _stamp_of_all(source, names, footers)
    stored = sum(footer.rows for footer in footers)
    rows = stored - sum(part.file.rows - part.rows for part in listed or ())
    said = manifest.rows_out if growth is None and manifest is not None else growth and growth.rows
    if said is not None and rows != said:
        raise ConfigError(
            f"{source.uri} has {rows} rows and its {(growth or EmbedManifest).FILE} says {said}: parts are missing "
            "or were added; run crem embed into it again, or remove what is not its own"
        )
    first = footers[0].schema
    vector = pa.field("embedding", pa.list_(pa.float32(), stamp.dim))
    fields = [vector if field.name == "embedding" else field for field in first if field.name not in _LEFT_OUT]
    columns = pa.schema(fields, metadata=first.metadata)
    parts = tuple(map(_part, listed)) if listed is not None else _hashed(source, names, footers)
    return EmbeddedParts(source, parts, stamp, columns, plan.source if plan is not None else None)


def rows_of_part(source: Folder, part: EmbeddedPart, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a part that have a vector, in their order.

    Raises:
        ConfigError: the part is missing or damaged. OSError: the storage does not answer for now.
    """
    try:
        with open_part_rows(source, part.name, part.file_checksum) as opened:
            needed = list(dict.fromkeys([*columns, *vector_columns(opened.footer.schema.names)]))
            first = 0
            for batch in opened.batches(_BATCH_ROWS, needed):
                table = part.keep(pa.table(batch), first)
                first += batch.num_rows
                yield _searchable(table.filter(table["embedding"].is_valid()), columns)
    except (pa.ArrowException, OSError) as error:
        if storage_fault(error) is StorageFault.PASSING:
            raise
        raise _unreadable(source, part.name, error) from error


def _stamp_of_all(source: Folder, names: list[str], footers: list[PartFooter]) -> EmbeddingStamp:
    stamps: dict[str, tuple[str, EmbeddingStamp]] = {}
    for name, footer in zip(names, footers, strict=True):
        stamp = footer.stamp
        if stamp is None:
            raise ConfigError(f"{source.uri}/{name} carries no model fingerprint; it was not written by crem embed")
        stamps.setdefault(stamp.fingerprint, (name, stamp))
    if len(stamps) > 1:
        both = " and ".join(f"{fingerprint} ({name})" for fingerprint, (name, _) in sorted(stamps.items())[:3])
        raise ConfigError(f"{source.uri} mixes embeddings of the models {both}; index them apart")
    return next(iter(stamps.values()))[1]


def _searchable(table: pa.Table, columns: list[str]) -> pa.RecordBatch:
    """Rows with a vector, as float32 of unit length."""
    vectors_ND = unit_vectors(table)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1] or 1)
    values = [vectors if name == "embedding" else table[name].combine_chunks() for name in columns]
    return pa.record_batch(values, names=columns)


def _footer(source: Folder, name: str) -> PartFooter:
    try:
        return require_storage(f"reading {source.uri}/{name}", partial(part_footer, source, name))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(source, name, error) from error


def _part(part: LivePart) -> EmbeddedPart:
    gone = tuple((int(first), int(rows)) for first, rows in part.gone)
    return EmbeddedPart(part.file.name, part.state, part.rows, part.file.bytes, gone)


def _hashed(source: Folder, names: list[str], footers: list[PartFooter]) -> tuple[EmbeddedPart, ...]:
    """The parts of an output without ledgers, each read once for its checksum."""
    sums = in_threads(partial(checksum_of, source), names)
    return tuple(
        EmbeddedPart(name, digest, footer.rows, size)
        for name, (digest, size), footer in zip(names, sums, footers, strict=True)
    )


def _unreadable(source: Folder, name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{source.uri}/{name} cannot be read ({error}); if the file is missing or damaged, run crem embed into that "
        "folder again with --repair"
    )
