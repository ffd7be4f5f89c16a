"""The distinct queries and targets of the rows, where each one's vector is, and which rows share what.

Many rows share a query or a target (a class name, a question), and each is embedded once: the driver numbers the items
in the order of the rows and gives each to the shard in which it first stands. It keeps 48 bytes a row and as many an
item, so one driver carries about 10^8 rows; the vectors stay with the workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crem.config import MineConfig
from pipelines.tables import schema
from pipelines.tables.row_shards import RowShard, read_row_shard
from pipelines.tables.schema import ArrowRow
from pipelines.tables.storage import Folder

__all__ = ["ItemNumbers", "RowKeys", "content_key", "item_key", "items_of_shard", "number_items", "row_keys"]


@dataclass(frozen=True)
class RowKeys:
    """Keys of the rows of one shard that take part: pairs of the split."""

    shard: int
    places: NDArray[np.int64]
    """[rows] position in the shard"""
    groups: NDArray[np.int64]
    """[rows] hash of what ``mine.within`` keeps apart"""
    items: NDArray[np.int64]
    """[rows, 2] key of the query and of the target, as they are embedded"""
    contents: NDArray[np.int64]
    """[rows, 2] key of their content, by which they are the same to a reader"""


def row_keys(shard: RowShard, *, source: Folder, config: MineConfig) -> RowKeys:
    """In a worker: the keys of a shard."""
    found = [
        (place, _group(row, config), *(key(row[side]) for key in (item_key, content_key) for side in _SIDES))
        for place, row in enumerate(read_row_shard(source, shard).to_pylist())
        if row["target"] is not None and row["split"].startswith(config.split)
    ]
    keys = np.array(found, np.int64).reshape(-1, 6)
    return RowKeys(shard.number, keys[:, 0], keys[:, 1], keys[:, 2:4], keys[:, 4:6])


_SIDES = ("query", "target")


def item_key(side: ArrowRow) -> int:
    """Equal for items that are embedded alike: text, images, their places and the instruction.

    An item that is one image and nothing else has the id of the image: ``crem embed PREPARED`` writes its vector so.
    """
    images: list[int] = side["images"] or []
    if len(images) == 1 and not side["text"] and not side["instruction"]:
        return images[0]
    content = (side["text"], images, side["image_at"] or [], side["instruction"])
    return schema.content_id(repr(content).encode(errors="surrogatepass"))


def content_key(side: ArrowRow) -> int:
    """Equal for items that say the same, whatever is asked about them: text without case and spacing, and images."""
    text = " ".join((side["text"] or "").casefold().split())
    return schema.content_id(repr((text, side["images"] or [])).encode(errors="surrogatepass"))


def _group(row: ArrowRow, config: MineConfig) -> int:
    kept_apart = {"task": (row["source"], row["task"]), "source": (row["source"],), "all": ()}[config.within]
    return schema.content_id(repr(kept_apart).encode(errors="surrogatepass"))


@dataclass
class ItemNumbers:
    """All distinct items, numbered from 0 in the order of the rows."""

    keys: NDArray[np.int64]
    """[items] sorted item keys"""
    numbers: NDArray[np.int64]
    """[items] number of each key"""
    contents: NDArray[np.int64]
    """[items] content key by number"""
    begins: NDArray[np.int64]
    """[shards + 1] number of the first item of each shard"""
    rows: NDArray[np.int64]
    """[items] position, within its shard, of the row that an item is taken from, by number"""
    is_target: NDArray[np.bool_]
    """[items] whether it is that row's target, by number"""
    targets: dict[int, NDArray[np.int64]]
    """Numbers of the distinct targets of each group, ascending"""
    shared_queries: NDArray[np.int64]
    """[pairs] content keys of queries, sorted"""
    shared_targets: NDArray[np.int64]
    """[pairs] content key of a target of that query"""
    hub_targets: NDArray[np.int64]
    """[pairs of queries with several targets] content keys of targets, sorted"""
    hub_queries: NDArray[np.int64]
    """[the same pairs] content key of a query of that target"""

    def number(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the items with these keys."""
        return self.numbers[np.searchsorted(self.keys, keys)]

    def keys_by_number(self) -> NDArray[np.int64]:
        """Item keys in the order of the numbers."""
        keys = np.empty_like(self.keys)
        keys[self.numbers] = self.keys
        return keys

    def positives(self, query: int, target: int) -> NDArray[np.int64]:
        """Content keys of what must count as right for a row of these contents.

        These are the targets of all rows with this query, and the targets of all queries that share this target: two
        drawings that one word finds are not negatives of each other, whatever other words find them.
        """
        found = [np.array([query, target], np.int64), self._targets(query)]
        begin, end = (np.searchsorted(self.hub_targets, target, side) for side in ("left", "right"))
        found += [self._targets(other) for other in self.hub_queries[begin:end].tolist()]
        return np.unique(np.concatenate(found))

    def _targets(self, query: int) -> NDArray[np.int64]:
        begin, end = (np.searchsorted(self.shared_queries, query, side) for side in ("left", "right"))
        return self.shared_targets[begin:end]


def number_items(shards: Sequence[RowKeys]) -> ItemNumbers:
    """In the driver: number the items of all shards; ``shards`` in the order of the rows."""
    items = np.concatenate([s.items for s in shards]).reshape(-1)
    contents = np.concatenate([s.contents for s in shards])
    shard_of = np.repeat([s.shard for s in shards], [2 * len(s.places) for s in shards])
    keys, first = np.unique(items, return_index=True)
    by_place = np.argsort(first, kind="stable")
    numbers = np.empty(len(keys), np.int64)
    numbers[by_place] = np.arange(len(keys))
    taken = first[by_place]  # place, in ``items``, of each item by number
    groups = np.concatenate([s.groups for s in shards])
    target_numbers = numbers[np.searchsorted(keys, items[1::2])]
    pairs = np.unique(contents, axis=0) if len(contents) else contents
    _, inverse, counts = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    hubs = pairs[counts[inverse] > 1]
    hubs = hubs[np.argsort(hubs[:, 1], kind="stable")]
    return ItemNumbers(
        keys=keys,
        numbers=numbers,
        contents=contents.reshape(-1)[taken],
        begins=np.searchsorted(shard_of[taken], np.arange(len(shards) + 1)),
        rows=np.repeat(np.concatenate([s.places for s in shards]), 2)[taken],
        is_target=(taken % 2).astype(np.bool_),
        targets={int(group): np.unique(target_numbers[groups == group]) for group in np.unique(groups)},
        shared_queries=pairs[:, 0],
        shared_targets=pairs[:, 1],
        hub_targets=hubs[:, 1],
        hub_queries=hubs[:, 0],
    )


def items_of_shard(rows: pa.Table, places: NDArray[np.int64], is_target: NDArray[np.bool_]) -> list[ArrowRow]:
    """Values of ``schema.ITEM``: the query or the target of the rows at ``places``."""
    taken = rows.select(list(_SIDES)).take(pa.array(places)).to_pylist()
    return [row[_SIDES[int(target)]] for row, target in zip(taken, is_target.tolist(), strict=True)]
