"""Near-identical images and texts of a corpus and of its evaluation sets, by one Ray Data shuffle.

Each task turns a part of a table into records: an item, a key that near items share, and the item's signature. A
shuffle brings the records of a key together, their signatures are compared (``candidate_pairs``), and the near pairs
come to the driver, which joins them to components. A corpus of few records is not shuffled but compared in the driver.
Items of evaluation sets are not compared with each other.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from crem.config import PrepareConfig
from pipelines.duplicates.candidate_pairs import NearPairs, find_pairs, thin_out
from pipelines.duplicates.components import MAX_PAIRS, Components, components
from pipelines.duplicates.evaluation_sets import EvaluationSet
from pipelines.duplicates.hamming_tables import hamming_keys, hamming_tables
from pipelines.duplicates.image_signature import IMAGE_SIGNATURE, ImageRelation, image_signature
from pipelines.duplicates.parts import TablePart, pieces
from pipelines.duplicates.row_content import COLUMNS, evidence_texts, texts_of
from pipelines.duplicates.text_signature import (
    MinHasher,
    MinHashRelation,
    TypingErrorRelation,
    normal_form,
    text_id,
    typing_keys,
)
from pipelines.tables import ray_tasks

__all__ = ["NearItems", "find_near_items"]


class Kind(IntEnum):
    """What a record is."""

    IMAGE = 0
    TYPING = 1
    """A short text without one word."""
    MINHASH = 2
    """A band of a long text."""
    PAIR = 3
    """A near pair that was found before the shuffle: of ``id`` and ``other``."""
    MARK = 4
    """Nothing; no task is without a record, since Ray Data forgets the columns of an empty block."""


RECORD = pa.schema(
    [
        ("bucket", pa.int32()),
        ("kind", pa.int8()),
        ("key", pa.int64()),
        ("id", pa.int64()),
        ("evaluation", pa.int16()),
        ("other", pa.int64()),
        ("signature", pa.binary()),
    ]
)
"""``evaluation`` is 0 for the corpus, else the number of the evaluation set from 1 on."""

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
_KEYS_OF_A_ROW = 16
"""Estimated records of the texts of a row."""
_IMAGES_AT_ONCE = 1024
_TEXTS_AT_ONCE = 4096


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


@dataclass(frozen=True)
class _Task:
    part: TablePart
    table: Literal["rows", "images"]
    evaluation: int = 0


@dataclass(frozen=True)
class _Search:
    """Settings of a search, the same for each of its tasks."""

    config: PrepareConfig
    masks: tuple[int, ...]
    buckets: int

    @property
    def minhasher(self) -> MinHasher:
        config = self.config
        return MinHasher(config.minhash_shingle_chars, config.minhash_permutations, config.minhash_bands)


def find_near_items(
    rows: Sequence[TablePart], images: Sequence[TablePart], evaluation: Sequence[EvaluationSet], config: PrepareConfig
) -> NearItems:
    """Compare the images and texts of a corpus with each other and with those of ``evaluation``.

    Raises:
        ConfigError: a library is missing. ResourceError: there are more near pairs than the driver holds.
    """
    count = sum(part.rows for part in images)
    masks = tuple(hamming_tables(count, config.near_image_bits))
    records = count * len(masks) + sum(part.rows for part in rows) * _KEYS_OF_A_ROW
    search = _Search(config, masks, buckets=max(4, -(-records // _RECORDS_PER_BUCKET)))
    tasks = [_Task(part, "images") for part in images] + [_Task(part, "rows") for part in rows]
    for number, held in enumerate(evaluation, 1):
        tasks += [_Task(part, "images", number) for part in held.image_parts]
        tasks += [_Task(part, "rows", number) for part in held.row_parts]
    held = ray.put(list(evaluation))
    found = ray_tasks.task_dataset(tasks).map_batches(partial(_records, search=search, evaluation=held), batch_size=1)
    if records <= _RECORDS_PER_BUCKET:
        together = pa.concat_tables(found.iter_batches(batch_size=None, batch_format="pyarrow"))
        return _join(iter([_near_pairs(together, config=config)]))
    pairs = found.groupby("bucket", num_partitions=search.buckets).map_groups(
        partial(_near_pairs, config=config), batch_format="pyarrow"
    )
    return _join(pairs.iter_batches(batch_size=None, batch_format="pyarrow"))


def _records(
    batch: dict[str, NDArray[Any]], *, search: _Search, evaluation: ray.ObjectRef[list[EvaluationSet]]
) -> Iterator[pa.Table]:
    """On a worker: the records of one task."""
    task: _Task = pickle.loads(batch[ray_tasks.TASK][0])
    held = ray.get(evaluation)[task.evaluation - 1] if task.evaluation else None
    yield _table(search, Kind.MARK, task, np.zeros(1, np.int64), np.zeros(1, np.int64), [b""])
    if task.table == "images":
        yield from _image_records(task, search, None if held is None else held.images)
    else:
        yield from _text_records(task, search)


def _image_records(task: _Task, search: _Search, wanted: NDArray[np.int64] | None) -> Iterator[pa.Table]:
    relation = ImageRelation(search.config.near_image_bits)
    for _, table in pieces(task.part, ["id", "bytes", "width", "height"]):
        for at in range(0, table.num_rows, _IMAGES_AT_ONCE):
            images = table.slice(at, _IMAGES_AT_ONCE).to_pylist()
            if wanted is not None:
                images = [image for image in images if _holds(wanted, image["id"])]
            if not images:
                continue
            ids = np.array([image["id"] for image in images], np.int64)
            signatures = np.array(
                [image_signature(image["bytes"], image["width"], image["height"]) for image in images]
            )
            keys = hamming_keys(signatures["dhash"], list(search.masks))
            yield from _thinned(search, Kind.IMAGE, task, keys, ids, signatures, relation)


def _text_records(task: _Task, search: _Search) -> Iterator[pa.Table]:
    """Each different text of a part once."""
    config = search.config
    known: set[int] = set()
    typing: list[tuple[int, int, bytes]] = []
    banded: list[tuple[int, int, bytes]] = []
    for _, table in pieces(task.part, COLUMNS):
        for row in table.to_pylist():
            texts = evidence_texts(row, config.contamination_text_chars) if task.evaluation else _normal_forms(row)
            for normal in texts:
                identity = text_id(normal)
                if identity in known:
                    continue
                known.add(identity)
                if len(normal) < config.minhash_min_chars:
                    typing += [(key, identity, word.encode()) for key, word in typing_keys(normal)]
                else:
                    signature = search.minhasher.signature(normal)
                    low = (signature & 0xFF).astype(np.uint8).tobytes()
                    banded += [(key, identity, low) for key in search.minhasher.keys(signature)]
        if len(typing) + len(banded) > _TEXTS_AT_ONCE:
            yield from _flush(search, task, typing, banded)
    yield from _flush(search, task, typing, banded)


def _normal_forms(row: dict[str, Any]) -> Iterator[str]:
    return (normal_form(text) for text in texts_of(row))


def _flush(
    search: _Search, task: _Task, typing: list[tuple[int, int, bytes]], banded: list[tuple[int, int, bytes]]
) -> Iterator[pa.Table]:
    if typing:
        keys, ids, words = zip(*typing, strict=True)
        yield _table(search, Kind.TYPING, task, np.array(keys, np.int64), np.array(ids, np.int64), list(words))
    if banded:
        keys, ids, low = zip(*banded, strict=True)
        signatures = _minhashes(list(low))
        relation = MinHashRelation(search.config.near_text_jaccard)
        arrays = np.array(keys, np.int64)[None], np.array(ids, np.int64)
        yield from _thinned(search, Kind.MINHASH, task, *arrays, signatures, relation)
    typing.clear()
    banded.clear()


def _thinned(
    search: _Search,
    kind: Kind,
    task: _Task,
    keys: NDArray[np.int64],
    ids: NDArray[np.int64],
    signatures: NDArray[Any],
    relation: ImageRelation | MinHashRelation,
) -> Iterator[pa.Table]:
    """Records of the items ``ids`` [N] under ``keys`` [tables, N], less those that a leader stands for."""
    for of_table in keys:
        order = np.lexsort((ids, of_table))
        if task.evaluation:
            send, near = np.ones(len(order), np.bool_), None
        else:
            send, near = thin_out(of_table[order], signatures[order], relation)
        sent = order[send]
        yield _table(search, kind, task, of_table[sent], ids[sent], [s.tobytes() for s in signatures[sent]])
        if near is not None and len(near.first):
            first, second = ids[order[near.first]], ids[order[near.second]]
            low = int(kind == Kind.IMAGE)
            yield _table(search, Kind.PAIR, task, first, first, [bytes([low])] * len(first), other=second)


def _table(
    search: _Search,
    kind: Kind,
    task: _Task,
    keys: NDArray[np.int64],
    ids: NDArray[np.int64],
    signatures: list[bytes],
    other: NDArray[np.int64] | None = None,
) -> pa.Table:
    count = len(ids)
    return pa.table(
        [
            pa.array((keys.view(np.uint64) % np.uint64(search.buckets)).astype(np.int32)),
            pa.array(np.full(count, int(kind), np.int8)),
            pa.array(keys),
            pa.array(ids),
            pa.array(np.full(count, task.evaluation, np.int16)),
            pa.array(ids if other is None else other),
            pa.array(signatures, pa.binary()),
        ],
        schema=RECORD,
    )


def _near_pairs(records: pa.Table, *, config: PrepareConfig) -> pa.Table:
    """On a worker: the near pairs among the records of one bucket."""
    kinds = records["kind"].to_numpy()
    relations: dict[Kind, tuple[Any, Callable[[list[bytes]], NDArray[Any]]]] = {
        Kind.IMAGE: (ImageRelation(config.near_image_bits), _images),
        Kind.TYPING: (TypingErrorRelation(), _words),
        Kind.MINHASH: (MinHashRelation(config.near_text_jaccard), _minhashes),
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


def _images(signatures: list[bytes]) -> NDArray[Any]:
    return np.frombuffer(b"".join(signatures), IMAGE_SIGNATURE)


def _minhashes(signatures: list[bytes]) -> NDArray[Any]:
    return np.frombuffer(b"".join(signatures), np.uint8).reshape(len(signatures), -1)


def _words(signatures: list[bytes]) -> NDArray[Any]:
    return np.array([word.decode() for word in signatures], object)


def _holds(ids: NDArray[np.int64], item: int) -> bool:
    at = int(np.searchsorted(ids, item))
    return at < len(ids) and int(ids[at]) == item


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
