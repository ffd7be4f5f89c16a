"""Rows for validation during a run, their batches, and a table of what is trained on and what is held out.

Rows of a split ``validation…`` are used if the table has them. Otherwise the training rows with the smallest hash of
their id are held out of training: the same ones for every seed, order and number of workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from crem.config import RunConfig
from pipelines.tables.prepared import PreparedRows, texts_of

if TYPE_CHECKING:
    from crem.data.collator import Batch, Collator

__all__ = ["DataMixRow", "data_mix", "hash_of", "split_rows", "training_texts", "validation_batches"]

log = logging.getLogger(__name__)

_MAX_SHARE = 0.1
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
    in_split = pc.starts_with(rows.table.column("split"), "validation").to_numpy(zero_copy_only=False)
    wanted = config.train.validation_rows if config.train.validate_every else 0
    has_split = bool(in_split.any())
    pool = np.flatnonzero(in_split if has_split else ~in_split)
    count = wanted if has_split else min(wanted, int(_MAX_SHARE * len(pool)))
    order = np.argsort(hash_of(rows.table.column("id").to_numpy()[pool]), kind="stable")
    chosen = np.zeros(len(in_split), dtype=bool)
    chosen[pool[order[:count]]] = True
    training = _only(rows, ~(in_split | chosen))
    if chosen.sum() < max(2, config.train.workers):
        if wanted:
            log.warning("no validation: too few rows for it (%d); add a split validation", int(chosen.sum()))
            training = _only(rows, ~in_split)
        return training, None
    return training, _only(rows, chosen)


def training_texts(rows: PreparedRows) -> list[str]:
    """The texts that a tokenizer is trained on: those of all splits ``train…``, held out or not."""
    in_split = pc.starts_with(rows.table.column("split"), "train").to_numpy(zero_copy_only=False)
    return texts_of(_only(rows, in_split))


def _only(rows: PreparedRows, chosen: NDArray[np.bool_]) -> PreparedRows:
    return PreparedRows(rows.table.filter(pa.array(chosen)).combine_chunks(), rows.image_table)


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


@dataclass
class DataMixRow:
    """Training and held-out rows of one source and task."""

    source: str
    task: str
    rows: int = 0
    """that are trained on"""
    pairs: int = 0
    """of them with a target"""
    answers: int = 0
    """of them with an answer"""
    held_out: int = 0
    """that are validated on"""


def data_mix(training: PreparedRows, held_out: PreparedRows | None) -> list[DataMixRow]:
    """What a run trains and validates on, by source and task; the largest first."""
    mix: dict[tuple[str, str], DataMixRow] = {}
    for rows in (training, held_out):
        if rows is None:
            continue
        table = rows.table.select(["source", "task"])
        for column, of in (("pairs", "target"), ("answers", "answer")):
            table = table.append_column(column, pc.is_valid(rows.table.column(of)).cast("int64"))
        sums = table.group_by(["source", "task"]).aggregate([([], "count_all"), ("pairs", "sum"), ("answers", "sum")])
        for found in sums.to_pylist():
            key = (found["source"], found["task"])
            entry = mix.setdefault(key, DataMixRow(*key))
            if rows is training:
                entry.rows, entry.pairs, entry.answers = found["count_all"], found["pairs_sum"], found["answers_sum"]
            else:
                entry.held_out = found["count_all"]
    return sorted(mix.values(), key=lambda entry: (-entry.rows, entry.source, entry.task))
