"""The rows of some splits without their content: all that the order of a run is made of, about 34 bytes a row.

A run holds this for every row and fetches the content of the rows of its next steps (``chosen_rows``). It is made by
reading the narrow columns of the row table: identifiers and labels, and of the texts only whether they are there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crem.config import RunConfig
from crem.data.mixing import MixingPlan
from pipelines.tables.part_reads import open_part, read_part
from pipelines.tables.storage import Folder

__all__ = ["Labels", "RowIndex", "SplitPrefix", "begins_with", "index_of", "scan_part"]

SplitPrefix = str | tuple[str, ...]
_LABELS = ("split", "source", "task")
_BATCH_ROWS = 65_536
"""Rows whose narrow columns are read at a time."""


@dataclass(frozen=True)
class Labels:
    """A column of few distinct values."""

    names: tuple[str | None, ...]
    codes: NDArray[np.int32]
    """[rows] positions in ``names``"""

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Labels:
        """Of strings, or of a dictionary of them."""
        array = column.unify_dictionaries().combine_chunks() if pa.types.is_dictionary(column.type) else column
        array = array if isinstance(array, pa.DictionaryArray) else array.combine_chunks().dictionary_encode("encode")
        names, codes = array.dictionary.to_pylist(), array.indices
        if codes.null_count:
            names, codes = [*names, None], codes.fill_null(len(names))
        return cls(tuple(names), codes.to_numpy(zero_copy_only=False).astype(np.int32))

    def select(self, chosen: NDArray[Any]) -> Labels:
        return Labels(self.names, self.codes[chosen])

    def starts_with(self, prefix: str) -> NDArray[np.bool_]:
        """[rows] whether the value begins so."""
        return np.array([bool(name and name.startswith(prefix)) for name in self.names], np.bool_)[self.codes]

    def in_order_of_appearance(self) -> NDArray[np.int64]:
        """[rows] a number for each value, in the order of their first rows; 0 where it is missing."""
        column = pa.array(self.codes)
        if None in self.names:
            column = pc.if_else(pc.equal(column, self.names.index(None)), None, column)
        numbers = column.dictionary_encode().indices.fill_null(0)
        return numbers.to_numpy(zero_copy_only=False).astype(np.int64)


@dataclass(frozen=True)
class RowIndex:
    """Rows in the order of their ids, or some of them; arrays of one value a row."""

    rows: Folder
    """the row table"""
    parts: tuple[str, ...]
    """file names of its parts"""
    ids: NDArray[np.int64]
    part: NDArray[np.int32]
    """position in ``parts``"""
    row: NDArray[np.int32]
    """number of the row in its part"""
    split: Labels
    source: Labels
    task: Labels
    paired: NDArray[np.bool_]
    """whether it has a target"""
    answered: NDArray[np.bool_]
    """whether it has an answer"""

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, chosen: NDArray[Any]) -> RowIndex:
        """The rows of a mask or of positions."""
        return RowIndex(
            self.rows,
            self.parts,
            ids=self.ids[chosen],
            part=self.part[chosen],
            row=self.row[chosen],
            split=self.split.select(chosen),
            source=self.source.select(chosen),
            task=self.task.select(chosen),
            paired=self.paired[chosen],
            answered=self.answered[chosen],
        )

    def plan(self, config: RunConfig) -> MixingPlan:
        """The order of a training run over these rows.

        A loss of weight 0 gets no rows of its own: without L_r, pairs count only where they have a question; without
        L_g, only pairs count.
        """
        paired, answered = self.paired, self.answered
        if config.loss.alpha_r == 0:
            paired = paired & answered
        if config.loss.alpha_g == 0:
            answered = paired
        return MixingPlan(
            retrieval=np.flatnonzero(paired),
            heterogeneous=np.flatnonzero(~paired & answered),
            tasks=self.task.in_order_of_appearance(),
            global_batch=config.train.global_batch,
            seed=config.train.seed,
            compression_probability=config.loss.compression_probability,
            config=config.data,
            chorus_counts=config.model.chorus_counts,
        )


def index_of(rows: Folder, parts: Sequence[str], scanned: Sequence[pa.Table]) -> RowIndex:
    """From what ``scan_part`` found in each of the parts."""
    found = pa.concat_tables([_nothing(), *scanned])
    counts = [table.num_rows for table in scanned]
    index = RowIndex(
        rows,
        tuple(parts),
        ids=found["id"].to_numpy(),
        part=np.repeat(np.arange(len(scanned), dtype=np.int32), counts),
        row=found["row"].to_numpy(),
        split=Labels.of(found["split"]),
        source=Labels.of(found["source"]),
        task=Labels.of(found["task"]),
        paired=found["paired"].to_numpy(),
        answered=found["answered"].to_numpy(),
    )
    return index.select(np.argsort(index.ids))


def scan_part(rows: Folder, name: str, split_prefix: SplitPrefix) -> pa.Table:
    """The narrow columns of the rows of a part whose split starts with a prefix, in their order.

    Raises:
        ConfigError: the part is missing or damaged.
    """
    return read_part(rows, name, lambda: _scan(rows, name, split_prefix))


def begins_with(split: pa.ChunkedArray, split_prefix: SplitPrefix) -> pa.ChunkedArray:
    """Of each split whether it starts with the prefix, or with one of several."""
    prefixes = [split_prefix] if isinstance(split_prefix, str) else split_prefix
    return pc.match_substring_regex(split.cast(pa.string()), "^(" + "|".join(map(re.escape, prefixes)) + ")")


def _scan(rows: Folder, name: str, split_prefix: SplitPrefix) -> pa.Table:
    found, start = [], 0
    with open_part(rows, name, whole=True) as file:
        reader = pq.ParquetFile(file, read_dictionary=list(_LABELS))
        answers = _all_or_none(reader.metadata, "answer")
        # of a struct, whether it is there is stored beside each field; instructions are the shortest one
        columns = ["id", *_LABELS, "target.instruction", *(["answer"] if answers is None else [])]
        for batch in reader.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
            table, count = pa.table(batch), batch.num_rows
            answered = table["answer"].is_valid() if answers is None else pa.array(np.full(count, answers))
            numbers = pa.array(np.arange(start, start + count, dtype=np.int32))
            narrow = table.select(["id", *_LABELS]).append_column("row", numbers)
            narrow = narrow.append_column("paired", table["target"].is_valid()).append_column("answered", answered)
            found.append(narrow.filter(begins_with(table["split"], split_prefix)))
            start += count
        return pa.concat_tables(found) if found else _nothing()


def _all_or_none(metadata: pq.FileMetaData, column: str) -> bool | None:
    """Whether the column has a value in every row (True) or in none (False), as the footer tells; None if it varies."""
    place = metadata.schema.names.index(column)
    chunks = [metadata.row_group(group).column(place) for group in range(metadata.num_row_groups)]
    if not all(c.statistics is not None and c.statistics.has_null_count for c in chunks):
        return None
    nulls = sum(c.statistics.null_count for c in chunks)
    return {0: True, metadata.num_rows: False}.get(nulls)


def _nothing() -> pa.Table:
    label, flag = pa.dictionary(pa.int32(), pa.string()), pa.bool_()
    fields = [("id", pa.int64()), *((name, label) for name in _LABELS), ("row", pa.int32())]
    return pa.schema([*fields, ("paired", flag), ("answered", flag)]).empty_table()
