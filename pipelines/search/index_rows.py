"""Rows of embeddings become fragments of an index's dataset: a task for each part, and one commit for all.

A task streams its part, so that it holds some thousand rows. What it wrote is noted in ``_work``: a build that was
interrupted takes it from there. The driver holds what Lance says of a fragment, one or a few kilobytes a part.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import lance
import pyarrow as pa
from lance.fragment import write_fragments

from crem.errors import ConfigError
from pipelines.search.embedded_parts import EmbeddedPart, EmbeddedParts, rows_of_part
from pipelines.search.index_dataset import DATASET, PART_COLUMN, WORK, IndexedPart, dataset_place
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["WrittenPart", "dataset_schema", "replace_all_rows", "replace_rows", "write_parts"]

_RESERVED = (PART_COLUMN, "_rowid", "_rowaddr", "_distance", "_score", "_relevance_score")
"""Names that the dataset, or a search in it, gives to columns of its own."""


@dataclass(frozen=True)
class WrittenPart:
    """A part whose rows are written, and in no version of the dataset yet."""

    part: IndexedPart
    fragments: tuple[str, ...]
    """Lance's metadata of them, as JSON."""


def dataset_schema(embedded: EmbeddedParts) -> pa.Schema:
    """Of the dataset.

    Raises:
        ConfigError: a kept column has a name that is taken.
    """
    if taken := [name for name in embedded.columns.names if name in _RESERVED]:
        raise ConfigError(
            f"{embedded.folder.uri} has the column {taken[0]!r}, a name that the index uses; rename it "
            "(embed.columns={...}) and embed again"
        )
    return embedded.columns.append(pa.field(PART_COLUMN, pa.int32()))


def write_parts(
    source: Folder,
    target: Folder,
    schema: pa.Schema,
    parts: Iterable[tuple[int, EmbeddedPart]],
    each: Callable[[Callable[[tuple[int, EmbeddedPart]], WrittenPart], Iterable[Any]], Iterable[WrittenPart]],
) -> list[WrittenPart]:
    """Write the rows of numbered parts; ``each`` runs a task for every one."""
    written = each(partial(_write_part, source=source, target=target, schema=schema), parts)
    return sorted(written, key=lambda part: part.part.number)


def _write_part(
    numbered: tuple[int, EmbeddedPart], *, source: Folder, target: Folder, schema: pa.Schema
) -> WrittenPart:
    """In a worker."""
    number, part = numbered
    note = f"{WORK}/{part.checksum}-{number:06d}.json"
    noted = target.read_json(note)
    if isinstance(noted, dict) and noted.get("schema") == str(schema):
        return WrittenPart(IndexedPart(number, part, noted["indexed"]), tuple(noted["fragments"]))
    uri, options = dataset_place(target)

    def write() -> tuple[int, tuple[str, ...]]:
        count = 0

        def rows() -> Iterator[pa.RecordBatch]:
            nonlocal count
            for batch in rows_of_part(source, part, schema.names[:-1]):
                if batch.num_rows:
                    count += batch.num_rows
                    of_part = pa.array([number], pa.int32()).take(pa.array([0] * batch.num_rows))
                    yield pa.record_batch([*batch.columns, of_part], schema=schema)

        batches = rows()
        first = next(batches, None)
        if first is None:
            return 0, ()
        reader = pa.RecordBatchReader.from_batches(schema, itertools.chain([first], batches))
        found = write_fragments(reader, uri, schema=schema, storage_options=options)
        return count, tuple(json.dumps(fragment.to_json()) for fragment in found)

    indexed, fragments = require_storage(f"writing {target.uri}/{DATASET}", write)
    target.write_json({"schema": str(schema), "indexed": indexed, "fragments": list(fragments)}, note)
    return WrittenPart(IndexedPart(number, part, indexed), fragments)


def replace_all_rows(target: Folder, schema: pa.Schema, written: list[WrittenPart]) -> Any:
    """Commit a version that has these rows and no others."""
    uri, options = dataset_place(target)
    operation = lance.LanceOperation.Overwrite(schema, _fragments(written))
    return lance.LanceDataset.commit(uri, operation, storage_options=options)


def replace_rows(dataset: Any, target: Folder, gone: list[int], written: list[WrittenPart]) -> Any:
    """Commit a version without the rows of the parts ``gone`` and with those that were written."""
    removed: list[int] = []
    updated: list[Any] = []
    if gone:
        predicate = f"{PART_COLUMN} IN ({', '.join(map(str, gone))})"
        fragments = dataset.get_fragments()
        for fragment, left in zip(fragments, in_threads(lambda f: f.delete(predicate), fragments), strict=True):
            if left is None:
                removed.append(fragment.fragment_id)
            elif left.deletion_file != fragment.metadata.deletion_file:
                updated.append(left)
    operation = lance.LanceOperation.Update(
        removed_fragment_ids=removed, updated_fragments=updated, new_fragments=_fragments(written)
    )
    _, options = dataset_place(target)
    return lance.LanceDataset.commit(dataset, operation, read_version=dataset.version, storage_options=options)


def _fragments(written: list[WrittenPart]) -> list[Any]:
    return [lance.FragmentMetadata.from_json(text) for part in written for text in part.fragments]
