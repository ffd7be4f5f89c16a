"""Near-identical images and texts of a corpus and of its evaluation sets, by Ray Data shuffles.

Each task turns a part of a table into records: an item, a key that near items share, and the item's signature. A
shuffle (``record_shuffle``) brings the records of a key together, their signatures are compared (``candidate_pairs``),
and the near pairs come to the driver, which joins them to components. A corpus of few records is not shuffled but
compared in the driver. Items of evaluation sets are not compared with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from crem.config import PrepareConfig
from pipelines.duplicates.candidate_pairs import NearPairs, find_pairs
from pipelines.duplicates.components import MAX_PAIRS, Components, components
from pipelines.duplicates.evaluation_sets import EvaluationSet
from pipelines.duplicates.hamming_tables import hamming_tables
from pipelines.duplicates.image_signature import ImageRelation
from pipelines.duplicates.near_records import (
    RECORD,
    Kind,
    NearTask,
    Search,
    image_signatures,
    minhashes,
    near_records,
    words,
)
from pipelines.duplicates.parts import TablePart
from pipelines.duplicates.record_shuffle import Buckets, collected, shuffled
from pipelines.duplicates.text_signature import MinHashRelation, TypingErrorRelation
from pipelines.tables.storage import Folder

__all__ = ["NearItems", "find_near_items"]

PAIR = pa.schema(
    [
        ("image", pa.bool_()),
        ("first", pa.int64()),
        ("second", pa.int64()),
        ("first_evaluation", pa.int16()),
        ("second_evaluation", pa.int16()),
        ("unchecked", pa.int64()),
    ]
)
_RECORDS_PER_BUCKET = 250_000
"""Records that one task of the shuffle holds: some 40 MB."""
_IDS_PER_RECORD = 3
_KEYS_OF_A_ROW = 16
"""Estimated records of the texts of a row."""


@dataclass(frozen=True)
class NearItems:
    """Near images and texts, by id."""

    images: Components
    texts: Components
    evaluation_images: dict[int, tuple[int, int]]
    """Images of the corpus that are near to one of an evaluation set: number of the set, from 1 on, and id there."""
    evaluation_texts: dict[int, tuple[int, int]]
    corpus_images: NDArray[np.int64]
    """Of the ids of ``images``, those that are in the corpus."""
    unchecked: int
    """Items that were not compared with all others of a key, because too many different ones share it."""


def find_near_items(
    rows: Sequence[TablePart],
    images: Sequence[TablePart],
    evaluation: Sequence[EvaluationSet],
    config: PrepareConfig,
    scratch: Folder,
) -> NearItems:
    """Compare the images and texts of a corpus with each other and with those of ``evaluation``.

    Raises:
        ConfigError: a library is missing. ResourceError: there are more near pairs than the driver holds.
    """
    count = sum(part.rows for part in images)
    masks = tuple(hamming_tables(count, config.near_image_bits))
    expected = count * len(masks) + sum(part.rows for part in rows) * _KEYS_OF_A_ROW
    buckets = Buckets.of(expected, _RECORDS_PER_BUCKET, _IDS_PER_RECORD)
    tasks = [NearTask(part, "images") for part in images] + [NearTask(part, "rows") for part in rows]
    for number, held in enumerate(evaluation, 1):
        tasks += [NearTask(part, "images", number) for part in held.image_parts]
        tasks += [NearTask(part, "rows", number) for part in held.row_parts]
    search = Search(config, masks, buckets.count)
    records = partial(near_records, search=search, evaluation=ray.put(list(evaluation)))
    if expected <= _RECORDS_PER_BUCKET:
        return _join(iter([_near_pairs(collected(tasks, records, RECORD), config=config)]))
    shuffles = shuffled(tasks, records, RECORD, buckets, scratch)
    grouped = (found.map_groups(partial(_near_pairs, config=config), batch_format="pyarrow") for found in shuffles)
    return _join(pairs for table in grouped for pairs in table.iter_batches(batch_size=None, batch_format="pyarrow"))


def _near_pairs(records: pa.Table, *, config: PrepareConfig) -> pa.Table:
    """On a worker: the near pairs among the records of one bucket."""
    kinds = records["kind"].to_numpy()
    relations: dict[Kind, tuple[Any, Callable[[list[bytes]], NDArray[Any]]]] = {
        Kind.IMAGE: (ImageRelation(config.near_image_bits), image_signatures),
        Kind.TYPING: (TypingErrorRelation(), words),
        Kind.MINHASH: (MinHashRelation(config.near_text_jaccard), minhashes),
    }
    tables = [_found_before(records.filter(pa.array(kinds == Kind.PAIR)))]
    for kind, (relation, decode) in relations.items():
        some = records.filter(pa.array(kinds == kind))
        if some.num_rows < 2:
            continue
        keys, ids, sets = (some[name].to_numpy() for name in ("key", "id", "evaluation"))
        order = np.lexsort((ids, sets, keys))
        keys, ids, sets = keys[order], ids[order], sets[order]
        again = np.r_[False, (keys[1:] == keys[:-1]) & (ids[1:] == ids[:-1]) & (sets[1:] == sets[:-1])]
        order, keys, ids, sets = order[~again], keys[~again], ids[~again], sets[~again]
        signatures = decode(some["signature"].take(pa.array(order)).to_pylist())
        pairs = find_pairs(keys, signatures, relation)
        tables.append(_pair_table(kind == Kind.IMAGE, ids, sets, pairs))
    return pa.concat_tables(tables)


def _found_before(records: pa.Table) -> pa.Table:
    image = [signature == b"\1" for signature in records["signature"].to_pylist()]
    zero = np.zeros(records.num_rows, np.int16)
    columns = [pa.array(image, pa.bool_()), records["id"], records["other"], zero, zero, zero.astype(np.int64)]
    return pa.table(columns, schema=PAIR)


def _pair_table(image: bool, ids: NDArray[np.int64], sets: NDArray[np.int16], pairs: NearPairs) -> pa.Table:
    first, second = pairs.first, pairs.second
    keep = (sets[first] == 0) | (sets[second] == 0)
    first, second = first[keep], second[keep]
    unchecked = np.zeros(len(first) + 1, np.int64)
    unchecked[-1] = pairs.unchecked
    columns = [np.full(len(first) + 1, image), *(np.append(c, c.dtype.type(0)) for c in (ids[first], ids[second]))]
    columns += [np.append(sets[side], np.int16(0)) for side in (first, second)]
    return pa.table([pa.array(column) for column in [*columns, unchecked]], schema=PAIR)


def _join(found: Iterator[pa.Table]) -> NearItems:
    """In the driver: components, and what of the corpus is in a component with an item of an evaluation set."""
    tables: list[pa.Table] = []
    unchecked = pairs = 0
    for table in found:
        unchecked += int(table["unchecked"].to_numpy().sum())
        table = table.drop_columns(["unchecked"])
        different = (table["first"].to_numpy() != table["second"].to_numpy()) | (
            table["first_evaluation"].to_numpy() != table["second_evaluation"].to_numpy()
        )
        table = table.filter(pa.array(different))
        pairs += table.num_rows
        tables.append(table)
        if pairs > 2 * MAX_PAIRS:  # pairs found under several keys are joined
            tables = [_distinct(pa.concat_tables(tables))]
            pairs = tables[0].num_rows
    table = pa.concat_tables([PAIR.empty_table().drop_columns(["unchecked"]), *tables])
    image = table["image"].to_numpy()
    image_pairs = _distinct(table.filter(pa.array(image)))
    images, evaluation_images = _components(image_pairs)
    texts, evaluation_texts = _components(_distinct(table.filter(pa.array(~image))))
    in_corpus = [
        image_pairs[side].to_numpy()[image_pairs[f"{side}_evaluation"].to_numpy() == 0] for side in ("first", "second")
    ]
    corpus_images = np.unique(np.concatenate(in_corpus))
    return NearItems(images, texts, evaluation_images, evaluation_texts, corpus_images, unchecked)


def _distinct(table: pa.Table) -> pa.Table:
    return table.group_by(table.column_names).aggregate([]).combine_chunks()


def _components(pairs: pa.Table) -> tuple[Components, dict[int, tuple[int, int]]]:
    first, second = pairs["first"].to_numpy(), pairs["second"].to_numpy()
    joined = components(first, second)
    in_evaluation: dict[int, tuple[int, int]] = {}
    for side in ("first", "second"):
        sets = pairs[f"{side}_evaluation"].to_numpy()
        ids = pairs[side].to_numpy()
        for number, item in sorted(zip(sets[sets > 0].tolist(), ids[sets > 0].tolist(), strict=True)):
            root = joined.of(item)
            in_evaluation[root] = min(in_evaluation.get(root, (number, item)), (number, item))
    if not in_evaluation:
        return joined, {}
    roots = np.fromiter(sorted(in_evaluation), np.int64, len(in_evaluation))
    members = np.isin(joined.representatives, roots)
    return joined, {
        item: in_evaluation[root]
        for item, root in zip(joined.ids[members].tolist(), joined.representatives[members].tolist(), strict=True)
    }
