"""Which of the rows or images of one id is the first of the corpus: in the driver, or of any number by shuffles.

A shuffle: the ids of every group of pieces go to buckets by id; a bucket keeps the first of each id and gives back the
others, by the group that holds them. Ray Data holds what it shuffles in actors, so a shuffle takes a share of the ids
that fits the CPUs, and there are as many rounds as are needed. The driver holds numbers of groups only.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.corpus.work_plan import GROUP_PIECES, WorkPlan, each_group
from pipelines.tables import ray_tasks
from pipelines.tables.storage import Folder

__all__ = ["IDS", "drop_repeats", "first_of_each"]

IDS = pa.schema([("id", pa.int64()), ("piece", pa.int64()), ("place", pa.int32())])
"""Ids and where they stand, in the order of the corpus."""
_HERE = 2_000_000
"""Ids that are sorted in the driver: 60 bytes each while it does so. Source: ours."""
_ORDER = [("piece", "ascending"), ("place", "ascending")]

Read: TypeAlias = Callable[[int], pa.Table]
"""``IDS`` of a group of pieces, by its number."""
Write: TypeAlias = Callable[[int, pa.Table], None]
"""Keeps those ``IDS`` of a group that an earlier place has."""


def drop_repeats(plan: WorkPlan, ids: int, read: Read, write: Write, scratch: Folder) -> None:
    """Find the repeated ids of all groups.

    Args:
        ids: about how many there are.
        scratch: a folder for what the rounds find.
    """
    if ids <= _HERE:
        repeats_here(plan, read, write)
        return
    rounds = ray_tasks.shuffle_rounds(ids)
    scratch.remove()  # of an interrupted run, whose cluster may have had other CPUs
    for number in range(rounds):
        _shuffle(plan, read, scratch, number, rounds)
    for _ in each_group(partial(_write_group, scratch=scratch, rounds=rounds, write=write), range(plan.groups)):
        pass
    scratch.remove()


def repeats_here(plan: WorkPlan, read: Read, write: Write) -> None:
    """In the driver."""
    tables = [read(group) for group in range(plan.groups)]
    repeated = ~first_of_each(np.concatenate([table["id"].to_numpy() for table in tables]))
    start = 0
    for group, table in enumerate(tables):
        write(group, table.filter(pa.array(repeated[start : start + table.num_rows])))
        start += table.num_rows


def _shuffle(plan: WorkPlan, read: Read, scratch: Folder, number: int, rounds: int) -> None:
    """Write down the repeats among the ids of one round."""
    buckets = ray_tasks.shuffle_buckets()

    def entries(batch: dict[str, NDArray[Any]]) -> pa.Table:
        table = pa.concat_tables([read(pickle.loads(group)) for group in batch[ray_tasks.TASK]])
        table = table.filter(pa.array(table["id"].to_numpy() % rounds == number))
        return table.append_column("bucket", pa.array(table["id"].to_numpy() // rounds % buckets))

    def repeated(bucket: pa.Table) -> pa.Table:
        table = bucket.select(IDS.names).sort_by(_ORDER)
        found = table.filter(pa.array(~first_of_each(table["id"].to_numpy())))
        return found.append_column("group", pa.array(found["piece"].to_numpy() // GROUP_PIECES))

    def written(found: pa.Table) -> pa.Table:
        group = found["group"][0].as_py()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, IDS) as file:
            file.write_table(found.select(IDS.names))
        scratch.write_bytes(sink.getvalue().to_pybytes(), _found_file(group, number))
        return pa.table({"group": pa.array([group], pa.int64())})

    shuffled = (
        ray_tasks.task_dataset(range(plan.groups))
        .map_batches(entries, batch_size=1)
        .groupby("bucket", num_partitions=buckets)
        .map_groups(repeated, batch_format="pyarrow")
        .groupby("group", num_partitions=min(plan.groups, buckets))
        .map_groups(written, batch_format="pyarrow")
    )
    for _ in shuffled.iter_batches(batch_size=None):
        pass


def _write_group(group: int, *, scratch: Folder, rounds: int, write: Write) -> None:
    names = [_found_file(group, number) for number in range(rounds)]
    tables = [
        pa.ipc.open_file(pa.BufferReader(scratch.read_bytes(name))).read_all() for name in names if scratch.exists(name)
    ]
    write(group, pa.concat_tables([IDS.empty_table(), *tables]).combine_chunks().sort_by(_ORDER))


def _found_file(group: int, number: int) -> str:
    return f"{group:06d}/{number:06d}.arrow"


def first_of_each(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[N] whether the value is the first of its kind."""
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[np.unique(values, return_index=True)[1]] = True
    return mask
