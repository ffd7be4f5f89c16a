"""The vectors and the items of a run in Ray's object store, which spills to disk, found by the number of an item.

Vectors come from two kinds of places: those that were given (``given_vectors``), and those that the run made
(``item_vectors``). Either way they are in parts; of each item the store knows its part and its row there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from crem.config import MineConfig
from pipelines.mining.given_vectors import GivenVectors, VectorPiece, read_piece
from pipelines.mining.item_vectors import VECTORS_FOLDER, ItemShard
from pipelines.mining.mined_items import ItemNumbers, items_of_shard
from pipelines.tables import schema
from pipelines.tables.row_shards import read_row_shard
from pipelines.tables.schema import ArrowRow
from pipelines.tables.storage import Folder

__all__ = ["TargetBlock", "VectorStore", "fill_store", "item_shards"]

log = logging.getLogger(__name__)

_BLOCK_TARGETS = 32_768
"""Targets of one block: 200 MB of vectors at 1,536 dimensions."""


@dataclass(frozen=True)
class TargetBlock:
    """Some targets of a group."""

    numbers: NDArray[np.int64]
    """[T] ascending"""
    contents: NDArray[np.int64]
    vectors_TD: NDArray[np.float32]


@dataclass
class VectorStore:
    """References to all vectors of a run, and what is known of the items. Opened parts are kept per process."""

    items: ItemNumbers
    parts: NDArray[np.int64]
    """[items] part of each item's vector"""
    rows: NDArray[np.int64]
    """[items] row of it in that part"""
    vectors: list[ray.ObjectRef]
    """[parts] vectors [N, D]"""
    valid: list[ray.ObjectRef]
    """[parts] whether each is a vector"""
    tables: list[ray.ObjectRef]
    """[shards] the items, as ``schema.ITEM``"""
    blocks: dict[int, list[ray.ObjectRef]] = field(default_factory=dict)
    """``TargetBlock`` of each group"""

    def vectors_of(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Vectors [N, D] of items and whether each is valid."""
        out: NDArray[np.float32] | None = None
        valid = np.zeros(len(numbers), np.bool_)
        parts, rows = self.parts[numbers], self.rows[numbers]
        for part in np.unique(parts):
            places = np.flatnonzero(parts == part)
            vectors = ray.get(self.vectors[part])
            if out is None:
                out = np.empty((len(numbers), vectors.shape[1]), np.float32)
            out[places], valid[places] = vectors[rows[places]], ray.get(self.valid[part])[rows[places]]
        return (np.empty((0, 1), np.float32) if out is None else out), valid

    def item(self, number: int) -> ArrowRow:
        """One item."""
        part = int(np.searchsorted(self.items.begins, number, side="right")) - 1
        value: ArrowRow = ray.get(self.tables[part])[number - int(self.items.begins[part])].as_py()
        return value


def item_shards(shards: Sequence[ItemShard], items: ItemNumbers, wanted: NDArray[np.bool_]) -> list[ItemShard]:
    """The items of each shard of which ``wanted`` [items] holds; shards without any are left out."""
    pieces = [slice(begin, end) for begin, end in zip(items.begins[:-1], items.begins[1:], strict=True)]
    chosen = [shard.only(wanted[piece]) for shard, piece in zip(shards, pieces, strict=True)]
    return [shard for shard in chosen if len(shard.keys)]


def fill_store(
    source: Folder,
    target: Folder,
    shards: Sequence[ItemShard],
    items: ItemNumbers,
    given: GivenVectors | None,
    config: MineConfig,
) -> ray.ObjectRef:
    """A ``VectorStore`` of all items: vectors from ``given`` where it has them, else from the parts in ``target``.

    Args:
        shards: of all items, in the order of their numbers.
    """
    keys = items.keys_by_number()
    parts, rows = np.full(len(keys), -1, np.int64), np.zeros(len(keys), np.int64)
    references: list[tuple[ray.ObjectRef, ray.ObjectRef]] = []
    if given is not None:
        pieces, positions = given.find(keys)
        wanted = {int(p): np.unique(positions[pieces == p]) for p in np.unique(pieces[pieces >= 0])}
        for part, (piece, needed) in enumerate(wanted.items()):
            here = pieces == piece
            parts[here], rows[here] = part, np.searchsorted(needed, positions[here])
        references += given.load(wanted)
    read = ray.remote(num_cpus=0.5, num_returns=2)(read_piece)
    for shard in item_shards(shards, items, parts < 0):
        numbers = items.number(shard.keys)
        parts[numbers], rows[numbers] = len(references), np.arange(len(numbers))
        made = VectorPiece(target.child(VECTORS_FOLDER), (shard.shard.name,))
        references.append(tuple(read.remote(made, rows[numbers])))
    tables = [ray.remote(num_cpus=0.5)(_items).remote(source, shard) for shard in shards]
    vectors, valid = (list(column) for column in zip(*references, strict=True))
    store = VectorStore(items, parts, rows, vectors, valid, tables)
    _add_blocks(store, config)
    return ray.put(store)


def _add_blocks(store: VectorStore, config: MineConfig) -> None:
    """The targets of each group, gathered in blocks."""
    shared = ray.put(store)
    gather = ray.remote(num_cpus=0.5)(_block)
    for group, numbers in store.items.targets.items():
        searched = _sample(numbers, store.items, config.max_targets)
        if len(searched) < len(numbers):
            log.warning("%d of %d targets of a task are searched (mine.max_targets)", len(searched), len(numbers))
        store.blocks[group] = [
            gather.remote([shared], searched[start : start + _BLOCK_TARGETS])
            for start in range(0, len(searched), _BLOCK_TARGETS)
        ]


def _sample(numbers: NDArray[np.int64], items: ItemNumbers, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the items, those with the lowest content keys, which are hashes; ascending."""
    if len(numbers) <= most:
        return numbers
    return np.sort(numbers[np.argsort(items.contents[numbers], kind="stable")[:most]])


def _block(store: list[ray.ObjectRef], numbers: NDArray[np.int64]) -> TargetBlock:
    """In a worker: the vectors of some targets; those without one are left out."""
    opened: VectorStore = ray.get(store[0])
    vectors, valid = opened.vectors_of(numbers)
    return TargetBlock(numbers[valid], opened.items.contents[numbers[valid]], vectors[valid])


def _items(source: Folder, shard: ItemShard) -> pa.Array:
    """In a worker: the items of a shard."""
    return pa.array(items_of_shard(read_row_shard(source, shard.shard), shard.places, shard.is_target), schema.ITEM)
