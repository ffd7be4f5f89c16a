"""Rows for validation during a run, their batches, and the table that says what is trained on and what is held out.

Rows of a split ``validation…`` are used where the table has them. Otherwise the training rows with the smallest hash of
their id are held out of training: the same ones for every seed, order and number of workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crem.config import RunConfig
from pipelines.tables.prepared import PreparedRows, texts_of

if TYPE_CHECKING:
    from crem.data.collator import Batch, Collator

__all__ = ["data_mix", "hash_of", "split_rows", "training_texts", "validation_batches"]

log = logging.getLogger(__name__)

_MOST = 0.1
"""Largest share of the training rows that is held out."""


def hash_of(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A well-mixed number for each id (the finaliser of splitmix64): ids themselves may be ordered by source."""
    x = ids.astype(np.uint64)
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))


def split_rows(rows: PreparedRows, config: RunConfig) -> tuple[PreparedRows, PreparedRows | None]:
    """Rows to train on, and rows to validate on, from those of all splits ``train…`` and ``validation…``.

    Without validation (``train.validate_every`` or ``train.validation_rows`` is 0) no training row is held out.
    """
    marked = pc.starts_with(rows.table.column("split"), "validation").to_numpy(zero_copy_only=False)
    wanted = config.train.validation_rows if config.train.validate_every else 0
    own = bool(marked.any())
    pool = np.flatnonzero(marked if own else ~marked)
    most = wanted if own else min(wanted, int(_MOST * len(pool)))
    order = np.argsort(hash_of(rows.table.column("id").to_numpy()[pool]), kind="stable")
    chosen = np.zeros(len(marked), dtype=bool)
    chosen[pool[order[:most]]] = True
    training = PreparedRows(_only(rows.table, ~(marked | chosen)), rows.image_table)
    if chosen.sum() < max(2, config.train.workers):
        if wanted:
            log.warning("no validation: too few rows for it (%d); add a split validation", int(chosen.sum()))
            training = PreparedRows(_only(rows.table, ~marked), rows.image_table)
        return training, None
    return training, PreparedRows(_only(rows.table, chosen), rows.image_table)


def training_texts(rows: PreparedRows) -> list[str]:
    """What a tokenizer is trained on: the texts of all splits ``train…``, whether or not a row is held out."""
    marked = pc.starts_with(rows.table.column("split"), "train").to_numpy(zero_copy_only=False)
    return texts_of(PreparedRows(_only(rows.table, marked), rows.image_table))


def _only(table: pa.Table, chosen: NDArray[np.bool_]) -> pa.Table:
    return table.filter(pa.array(chosen)).combine_chunks()


def validation_batches(
    rows: PreparedRows, config: RunConfig, collator: Collator, *, rank: int, ranks: int
) -> Iterator[tuple[Batch, Batch]]:
    """This rank's share of the rows, in as many batches as on every rank, each with z = 0 and with z = 1."""
    size = config.train.chunk_rows or config.train.global_batch // ranks
    count = rows.table.num_rows
    each = min(-(-count // (ranks * size)), count // ranks)
    shares = np.array_split(np.arange(count), ranks * each)
    for numbers in shares[rank * each : (rank + 1) * each]:
        native, compressed = (
            collator.examples(rows.examples(numbers, np.full(len(numbers), z))) for z in (False, True)
        )
        yield native, compressed


def data_mix(training: PreparedRows, held_out: PreparedRows | None) -> list[dict[str, Any]]:
    """Rows by source and task: how many are trained on, how many of them have a target or an answer, how many are held
    out. Ordered by size."""
    counts: dict[tuple[str, str], dict[str, Any]] = {}
    for name, rows in (("rows", training), ("held_out", held_out)):
        if rows is None:
            continue
        table = rows.table.select(["source", "task"])
        for column, of in (("pairs", "target"), ("answers", "answer")):
            table = table.append_column(column, pc.is_valid(rows.table.column(of)).cast("int64"))
        sums = table.group_by(["source", "task"]).aggregate([([], "count_all"), ("pairs", "sum"), ("answers", "sum")])
        for found in sums.to_pylist():
            key = (found["source"], found["task"])
            entry = counts.setdefault(
                key, {"source": key[0], "task": key[1], "rows": 0, "pairs": 0, "answers": 0, "held_out": 0}
            )
            entry[name] = found["count_all"]
            if name == "rows":
                entry |= {"pairs": found["pairs_sum"], "answers": found["answers_sum"]}
    return sorted(counts.values(), key=lambda entry: (-entry["rows"], entry["source"], entry["task"]))
