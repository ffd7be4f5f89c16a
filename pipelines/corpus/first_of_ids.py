"""Which of the rows or images of one id is the first of the corpus: in the driver, or of any number by a shuffle.

The shuffle: the ids of every group of pieces go to buckets by id; a bucket keeps the first of each id and gives back
the others, by the group that holds them; a task per group writes them down. The driver holds numbers of groups only.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.corpus.work_plan import GROUP_PIECES, WorkPlan
from pipelines.tables import ray_tasks

__all__ = ["IDS", "drop_repeats", "first_of_each"]

IDS = pa.schema([("id", pa.int64()), ("piece", pa.int64()), ("place", pa.int32())])
"""Ids and where they stand, in the order of the corpus."""
_HERE = 2_000_000
"""Ids that are sorted in the driver: 60 bytes each while it does so. Source: ours."""
_IDS_PER_BUCKET = 2_000_000

Read: TypeAlias = Callable[[int], pa.Table]
"""``IDS`` of a group of pieces, by its number."""
Write: TypeAlias = Callable[[int, pa.Table], None]
"""Keeps those ``IDS`` of a group that an earlier place has."""


def drop_repeats(plan: WorkPlan, ids: int, read: Read, write: Write) -> None:
    """Find the repeated ids of all groups.

    Args:
        ids: about how many there are.
    """
    if ids <= _HERE:
        repeats_here(plan, read, write)
    else:
        repeats_by_shuffle(plan, read, write, buckets=1 + ids // _IDS_PER_BUCKET)


def repeats_here(plan: WorkPlan, read: Read, write: Write) -> None:
    """In the driver."""
    tables = [read(group) for group in range(plan.groups)]
    repeated = ~first_of_each(np.concatenate([table["id"].to_numpy() for table in tables]))
    start = 0
    for group, table in enumerate(tables):
        write(group, table.filter(pa.array(repeated[start : start + table.num_rows])))
        start += table.num_rows


def repeats_by_shuffle(plan: WorkPlan, read: Read, write: Write, *, buckets: int) -> None:
    """By Ray Data."""

    def entries(batch: dict[str, NDArray[Any]]) -> pa.Table:
        table = pa.concat_tables([read(pickle.loads(group)) for group in batch[ray_tasks.TASK]])
        return table.append_column("bucket", pa.array(table["id"].to_numpy() % buckets))

    def repeated(bucket: pa.Table) -> pa.Table:
        table = bucket.select(IDS.names).sort_by([("piece", "ascending"), ("place", "ascending")])
        found = table.filter(pa.array(~first_of_each(table["id"].to_numpy())))
        return found.append_column("group", pa.array(found["piece"].to_numpy() // GROUP_PIECES))

    def written(found: pa.Table) -> pa.Table:
        group = found["group"][0].as_py()
        write(group, found.select(IDS.names).sort_by([("piece", "ascending"), ("place", "ascending")]))
        return pa.table({"group": pa.array([group], pa.int64())})

    shuffled = (
        ray_tasks.task_dataset(range(plan.groups))
        .map_batches(entries, batch_size=1)
        .groupby("bucket", num_partitions=min(buckets, 200))
        .map_groups(repeated, batch_format="pyarrow")
        .groupby("group", num_partitions=min(plan.groups, 200))
        .map_groups(written, batch_format="pyarrow")
    )
    done = {row["group"] for row in shuffled.iter_rows()}
    for group in set(range(plan.groups)) - done:  # nothing is repeated in it
        write(group, IDS.empty_table())


def first_of_each(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[N] whether the value is the first of its kind."""
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[np.unique(values, return_index=True)[1]] = True
    return mask
