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
from numpy.typing import NDArray

from crem.config import RunConfig
from pipelines.tables.chosen_rows import content_of
from pipelines.tables.prepared import PreparedRows, texts_of
from pipelines.tables.row_index import RowIndex

if TYPE_CHECKING:
    from crem.data.collator import Batch, Collator

__all__ = ["DataMixRow", "data_mix", "hash_of", "split_rows", "training_texts", "validation_batches"]

log = logging.getLogger(__name__)

_MAX_SHARE = 0.1
"""Largest share of the training rows that is held out."""
TEXT_ROWS = 200_000
"""Most rows whose texts a tokenizer is trained on. Source: ours."""


def hash_of(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A well-mixed number for each id (the finaliser of splitmix64): ids themselves may be ordered by source."""
    x = ids.astype(np.uint64)
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))


def split_rows(rows: RowIndex, config: RunConfig) -> tuple[RowIndex, RowIndex | None]:
    """Rows to train on, and rows to validate on, from those of all splits ``train…`` and ``validation…``.

    Without validation (``train.validate_every`` or ``train.validation_rows`` is 0) no training row is held out.
    """
    in_split = rows.split.starts_with("validation")
    wanted = config.train.validation_rows if config.train.validate_every else 0
    has_split = bool(in_split.any())
    pool = np.flatnonzero(in_split if has_split else ~in_split)
    count = min(len(pool), wanted if has_split else min(wanted, int(_MAX_SHARE * len(pool))))
    chosen = np.zeros(len(in_split), dtype=bool)
    chosen[_smallest(pool, hash_of(rows.ids[pool]), count)] = True
    training = rows.select(~(in_split | chosen))
    if chosen.sum() < max(2, config.train.workers):
        if wanted:
            log.warning("no validation: too few rows for it (%d); add a split validation", int(chosen.sum()))
            training = rows.select(~in_split)
        return training, None
    return training, rows.select(chosen)


def training_texts(rows: RowIndex) -> list[str]:
    """The texts that a tokenizer is trained on: those of all splits ``train…``, held out or not.

    Of more than ``TEXT_ROWS`` rows, those with the smallest hashes of their ids: a vocabulary needs no more, and a
    corpus of any size fits in the driver.
    """
    pool = np.flatnonzero(rows.split.starts_with("train"))
    if len(pool) > TEXT_ROWS:
        log.info("the tokenizer is trained on the texts of %d of %d rows", TEXT_ROWS, len(pool))
        pool = np.sort(_smallest(pool, hash_of(rows.ids[pool]), TEXT_ROWS))
    return texts_of(PreparedRows(content_of(rows.select(pool)), {}))


def _smallest(pool: NDArray[np.int64], hashes: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """The ``count`` of ``pool`` with the smallest hashes."""
    return pool[np.argpartition(hashes, count - 1)[:count]] if count else pool[:0]


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


def data_mix(training: RowIndex, held_out: RowIndex | None) -> list[DataMixRow]:
    """What a run trains and validates on, by source and task; the largest first."""
    mix: dict[tuple[str, str], DataMixRow] = {}
    for rows in (training, held_out):
        if rows is None:
            continue
        tasks = len(rows.task.names)
        kinds = rows.source.codes.astype(np.int64) * tasks + rows.task.codes
        size = len(rows.source.names) * tasks
        counts = [np.bincount(kinds, weights, size) for weights in (None, rows.paired, rows.answered)]
        for kind in np.flatnonzero(counts[0]).tolist():
            key = (str(rows.source.names[kind // tasks]), str(rows.task.names[kind % tasks]))
            entry = mix.setdefault(key, DataMixRow(*key))
            if rows is training:
                entry.rows, entry.pairs, entry.answers = (int(count[kind]) for count in counts)
            else:
                entry.held_out = int(counts[0][kind])
    return sorted(mix.values(), key=lambda entry: (-entry.rows, entry.source, entry.task))
