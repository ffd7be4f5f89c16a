"""What ``near_items`` compares: records of the images and texts of a part of a table, made by a task.

A record has an item, a key that near items share, and the item's signature. Items that are nearly the same within a
part are told apart here already: one stands for the others (``candidate_pairs.thin_out``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from crem.config import PrepareConfig
from pipelines.duplicates.candidate_pairs import thin_out
from pipelines.duplicates.evaluation_sets import EvaluationSet
from pipelines.duplicates.hamming_tables import hamming_keys
from pipelines.duplicates.image_signature import IMAGE_SIGNATURE, ImageRelation, image_signature
from pipelines.duplicates.parts import TablePart, pieces
from pipelines.duplicates.row_content import COLUMNS, evidence_texts, texts_of
from pipelines.duplicates.text_signature import MinHasher, MinHashRelation, normal_form, text_id, typing_keys

__all__ = ["RECORD", "Kind", "NearTask", "Search", "image_signatures", "minhashes", "near_records", "words"]


class Kind(IntEnum):
    """What a record is."""

    IMAGE = 0
    TYPING = 1
    """A short text without one word."""
    MINHASH = 2
    """A band of a long text."""
    PAIR = 3
    """A near pair that was found before the shuffle: of ``id`` and ``other``."""


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

_IMAGES_AT_ONCE = 1024
_TEXTS_AT_ONCE = 4096


@dataclass(frozen=True)
class NearTask:
    """A part of a table, of the corpus or of the evaluation set of a number from 1 on."""

    part: TablePart
    table: Literal["rows", "images"]
    evaluation: int = 0


@dataclass(frozen=True)
class Search:
    """Settings of a search, the same for each of its tasks."""

    config: PrepareConfig
    masks: tuple[int, ...]
    buckets: int

    @property
    def minhasher(self) -> MinHasher:
        config = self.config
        return MinHasher(config.minhash_shingle_chars, config.minhash_permutations, config.minhash_bands)


def near_records(
    task: NearTask, *, search: Search, evaluation: ray.ObjectRef[list[EvaluationSet]]
) -> Iterator[pa.Table]:
    """On a worker: the records of one task."""
    held = ray.get(evaluation)[task.evaluation - 1] if task.evaluation else None
    if task.table == "images":
        yield from _image_records(task, search, None if held is None else held.images)
    else:
        yield from _text_records(task, search)


def _image_records(task: NearTask, search: Search, wanted: NDArray[np.int64] | None) -> Iterator[pa.Table]:
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


def _text_records(task: NearTask, search: Search) -> Iterator[pa.Table]:
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
    search: Search, task: NearTask, typing: list[tuple[int, int, bytes]], banded: list[tuple[int, int, bytes]]
) -> Iterator[pa.Table]:
    if typing:
        keys, ids, words = zip(*typing, strict=True)
        yield _table(search, Kind.TYPING, task, np.array(keys, np.int64), np.array(ids, np.int64), list(words))
    if banded:
        keys, ids, low = zip(*banded, strict=True)
        signatures = minhashes(list(low))
        relation = MinHashRelation(search.config.near_text_jaccard)
        arrays = np.array(keys, np.int64)[None], np.array(ids, np.int64)
        yield from _thinned(search, Kind.MINHASH, task, *arrays, signatures, relation)
    typing.clear()
    banded.clear()


def _thinned(
    search: Search,
    kind: Kind,
    task: NearTask,
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
    search: Search,
    kind: Kind,
    task: NearTask,
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


def image_signatures(signatures: list[bytes]) -> NDArray[Any]:
    """[records] ``IMAGE_SIGNATURE`` of the column ``signature``."""
    return np.frombuffer(b"".join(signatures), IMAGE_SIGNATURE)


def minhashes(signatures: list[bytes]) -> NDArray[Any]:
    """[records, permutations] uint8: the low bytes of MinHashes, of the column ``signature``."""
    return np.frombuffer(b"".join(signatures), np.uint8).reshape(len(signatures), -1)


def words(signatures: list[bytes]) -> NDArray[Any]:
    """[records] str: the words that short texts are without, of the column ``signature``."""
    return np.array([word.decode() for word in signatures], object)


def _holds(ids: NDArray[np.int64], item: int) -> bool:
    at = int(np.searchsorted(ids, item))
    return at < len(ids) and int(ids[at]) == item
