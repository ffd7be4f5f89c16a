"""The worker: finds the negatives of the rows of a shard among blocks of targets, and writes the shard's part.

The vectors are in Ray's object store, in parts of items and again in blocks of the targets of one group, which all
workers of a node map. A worker holds the queries of its shard, one block at a time, and 128 rows of similarities.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from crem.config import MineConfig
from pipelines.mining.mined_items import RowKeys
from pipelines.mining.negative_choice import Candidates, choose, top_candidates
from pipelines.mining.vector_store import TargetBlock, VectorStore
from pipelines.tables import ray_tasks, schema
from pipelines.tables.new_version import parquet_bytes
from pipelines.tables.row_shards import RowShard, read_row_shard
from pipelines.tables.schema import ArrowRow
from pipelines.tables.storage import Folder

__all__ = ["MINED", "MineTask", "MinedShard", "ShardMiner", "finished_shard"]

MINED = pa.schema(
    [
        ("id", pa.int64()),  # of the row
        ("positive_score", pa.float32()),  # null where the row took no part
        (
            "negatives",
            pa.list_(pa.struct([("content", pa.int64()), ("score", pa.float32()), ("rank", pa.int32())])),
        ),
        ("dropped", pa.int32()),  # candidates of the window that counted as false negatives
        ("reason", pa.string()),  # why there are fewer than asked for
    ]
)


@dataclass(frozen=True)
class MineTask:
    """The rows of a shard and their keys."""

    shard: RowShard
    keys: RowKeys


@dataclass(frozen=True)
class MinedShard:
    """What a shard's part holds."""

    rows: int
    mined: int
    """Negatives that were added."""
    dropped: int
    """Candidates that counted as false negatives."""
    by_reason: Counter[str]
    """Rows with fewer negatives than asked for."""
    by_split_task: Counter[str]


class ShardMiner:
    """The actor: mines a shard per call."""

    def __init__(self, source: Folder, target: Folder, store: list[ray.ObjectRef], config: MineConfig):
        self.source, self.target, self.config = source, target, config
        self.store: VectorStore = ray.get(store[0])

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [ray_tasks.attempt(self.mine_shard, task) for task in batch[ray_tasks.TASK].to_pylist()]
        )

    def mine_shard(self, task: MineTask) -> MinedShard:
        """Write the rows of a shard with their negatives, and what was mined."""
        rows = read_row_shard(self.source, task.shard)
        records = [self._left_out(row_id) for row_id in rows["id"].to_pylist()]
        added: dict[int, list[int]] = {}
        keys = task.keys
        for group in np.unique(keys.groups):
            self._mine_group(int(group), np.flatnonzero(keys.groups == group), keys, records, added)
        made = [
            row | {"negatives": [*(row["negatives"] or []), *map(self.store.item, added.get(place, []))]}
            for place, row in enumerate(rows.to_pylist())
        ]
        tables = (pa.Table.from_pylist(made, schema=schema.ROWS), pa.Table.from_pylist(records, schema=MINED))
        for table, folder in zip(tables, ("rows", "mined"), strict=True):  # the latter says that the shard is done
            self.target.write_bytes(parquet_bytes(table), folder, task.shard.name)
        return outcome_of(*tables)

    def _left_out(self, row_id: int) -> ArrowRow:
        return {
            "id": row_id,
            "positive_score": None,
            "negatives": [],
            "dropped": 0,
            "reason": "not_of_the_split",
        }

    def _mine_group(
        self,
        group: int,
        chosen: NDArray[np.int64],
        keys: RowKeys,
        records: list[ArrowRow],
        added: dict[int, list[int]],
    ) -> None:
        """Fill ``records`` and ``added`` (numbers of items by row) for the rows of one group."""
        store, items = self.store, self.store.items
        queries, query_valid = store.vectors_of(items.number(keys.items[chosen, 0]))
        targets, target_valid = store.vectors_of(items.number(keys.items[chosen, 1]))
        positive = np.einsum("nd,nd->n", queries, targets)
        forbidden = [items.positives(query, target) for query, target in keys.contents[chosen].tolist()]
        found: Candidates | None = None
        for reference in store.blocks[group]:
            block: TargetBlock = ray.get(reference)
            if len(block.numbers):
                found = top_candidates(
                    queries, block.vectors_TD, block.numbers, block.contents, forbidden, self.config.ranks[1], found
                )
        for i, place in enumerate(keys.places[chosen].tolist()):
            record = records[place]
            if not (query_valid[i] and target_valid[i]):
                record["reason"] = "no_vector"
                continue
            record["positive_score"] = float(positive[i])
            numbers = found.numbers_NL[i] if found else np.empty(0, np.int64)
            scores = found.scores_NL[i] if found else np.empty(0, np.float32)
            contents = items.contents[numbers]  # of a place without a candidate it is not looked at
            places, record["dropped"] = choose(numbers, scores, contents, positive[i], record["id"], self.config)
            record["negatives"] = [
                {"content": int(contents[p]), "score": float(scores[p]), "rank": p + 1} for p in places
            ]
            record["reason"] = "too_few_left" if len(places) < self.config.negatives else None
            added[place] = [int(numbers[p]) for p in places]


def outcome_of(rows: pa.Table, mined: pa.Table) -> MinedShard:
    """Counts of a shard from its two parts."""
    pairs = zip(rows["split"].to_pylist(), rows["task"].to_pylist(), strict=True)
    return MinedShard(
        rows=rows.num_rows,
        mined=sum(map(len, mined["negatives"].to_pylist())),
        dropped=sum(mined["dropped"].to_pylist()),
        by_reason=Counter(mined["reason"].drop_null().to_pylist()),
        by_split_task=Counter(f"{split}/{task}" for split, task in pairs),
    )


def finished_shard(target: Folder, shard: RowShard) -> MinedShard | None:
    """The outcome of a shard that an earlier run finished, or ``None``."""
    if not target.exists("mined", shard.name):
        return None
    try:
        tables = []
        for folder in ("rows", "mined"):
            with target.open(folder, shard.name) as file:
                tables.append(pq.ParquetFile(file, page_checksum_verification=True).read())
    except (pa.ArrowException, OSError):
        return None
    return outcome_of(*tables) if tables[0].num_rows == tables[1].num_rows == shard.rows else None
