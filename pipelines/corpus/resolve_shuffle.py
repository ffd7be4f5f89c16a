"""The decisions of ``decisions.resolve_here`` for any number of rows: by Ray Data shuffles of identifiers.

1. The ids of the rows of every group of pieces go to buckets by id; a bucket keeps the first row of each id and gives
   back the others, by the group that holds them.
2. The ids of the images that kept rows refer to go the same way, and a bucket keeps the first piece of each image.
3. A task per group writes its decisions.

The driver holds numbers of groups only. Rows that are left out by choice must fit a process: they are few.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from pipelines.corpus.decisions import (
    GroupDecisions,
    first_of_each,
    left_out_rows,
    read_left_out,
    wanted_images,
)
from pipelines.corpus.ledger import read_ledgers
from pipelines.corpus.work_plan import GROUP_PIECES, WorkPlan
from pipelines.tables import ray_tasks
from pipelines.tables.storage import Folder

__all__ = ["resolve_by_shuffle"]

_IDS_PER_BUCKET = 2_000_000
_FOUND = pa.schema([("id", pa.int64()), ("piece", pa.int64()), ("place", pa.int32()), ("chosen", pa.bool_())])
"""A row or image to leave out: its place is its position in the piece; ``chosen`` rows stand in ``left_out/``."""


@dataclass(frozen=True)
class _Group:
    number: int
    pieces: range


def resolve_by_shuffle(work: Folder, plan: WorkPlan, *, rows: int, ids_per_bucket: int = _IDS_PER_BUCKET) -> None:
    """Decide on all pieces and write the decisions.

    Args:
        rows: about how many rows were staged.
    """
    buckets = 1 + rows // ids_per_bucket
    groups = [_Group(number, plan.group(number)) for number in range(plan.groups)]
    left_out = ray.put(read_left_out(work))

    def first_rows(bucket: pa.Table) -> pa.Table:
        table = bucket.sort_by([("piece", "ascending"), ("place", "ascending")])
        ids = table["id"].to_numpy()
        first = first_of_each(ids)
        chosen = first & np.isin(ids, ray.get(left_out)["id"].to_numpy())
        table = table.set_column(table.schema.get_field_index("chosen"), "chosen", pa.array(chosen))
        return table.filter(pa.array(~first | chosen))

    def first_images(bucket: pa.Table) -> pa.Table:
        table = bucket.sort_by([("piece", "ascending"), ("place", "ascending")])
        return table.filter(pa.array(~first_of_each(table["id"].to_numpy())))

    def write(task: bytes, dropped: pa.Table) -> None:
        _write_rows(pickle.loads(task), dropped, ray.get(left_out), work)

    _by_group(groups, lambda group: _row_ids(group, work), first_rows, write, buckets)
    _by_group(
        groups,
        lambda group: _wanted_ids(group, work),
        first_images,
        lambda task, dropped: _write_images(pickle.loads(task), dropped, work),
        buckets,
    )


def _by_group(
    groups: list[_Group],
    read: Callable[[_Group], pa.Table],
    decide: Callable[[pa.Table], pa.Table],
    write: Callable[[bytes, pa.Table], None],
    buckets: int,
) -> None:
    """Ids of all groups to buckets, and what a bucket decides back to the groups."""

    def entries(batch: pa.Table) -> pa.Table:
        table = pa.concat_tables([read(pickle.loads(task)) for task in batch[ray_tasks.TASK].to_pylist()])
        return table.append_column("bucket", pa.array(table["id"].to_numpy() % buckets))

    def decided(bucket: pa.Table) -> pa.Table:
        found = decide(bucket.select(_FOUND.names))
        return found.append_column("group", pa.array(found["piece"].to_numpy() // GROUP_PIECES))

    def written(found: pa.Table) -> pa.Table:
        number = found["group"][0].as_py()
        write(pickle.dumps(groups[number]), found.select(_FOUND.names))
        return pa.table({"group": pa.array([number], pa.int64())})

    shuffled = (
        ray_tasks.task_dataset(groups)
        .map_batches(entries, batch_size=1, batch_format="pyarrow")
        .groupby("bucket", num_partitions=min(buckets, 200))
        .map_groups(decided, batch_format="pyarrow")
        .groupby("group", num_partitions=min(len(groups), 200))
        .map_groups(written, batch_format="pyarrow")
    )
    done = {row["group"] for row in shuffled.iter_rows()}
    for group in groups:
        if group.number not in done:  # nothing is left out of it
            write(pickle.dumps(group), _FOUND.empty_table())


def _row_ids(group: _Group, work: Folder) -> pa.Table:
    """``_FOUND`` of all rows of a group."""
    ledgers = read_ledgers(work, group.pieces)
    return _entries([(ledger.piece, ledger.row_ids, np.arange(len(ledger.row_ids))) for ledger in ledgers])


def _wanted_ids(group: _Group, work: Folder) -> pa.Table:
    """``_FOUND`` of the images of a group to which its kept rows refer."""
    rows = GroupDecisions.read_rows(work, group.number)
    wanted = []
    for ledger in read_ledgers(work, group.pieces):
        places = np.flatnonzero(wanted_images(ledger, GroupDecisions.kept(rows, ledger)))
        wanted.append((ledger.piece, ledger.image_ids[places], places))
    return _entries(wanted)


def _entries(found: list[tuple[int, np.ndarray, np.ndarray]]) -> pa.Table:  # type: ignore[type-arg]
    ids = np.concatenate([np.empty(0, np.int64), *(ids for _, ids, _ in found)])
    pieces = np.concatenate([np.empty(0, np.int64), *(np.full(len(ids), piece) for piece, ids, _ in found)])
    places = np.concatenate([np.empty(0, np.int64), *(places for _, _, places in found)])
    chosen = np.zeros(len(ids), np.bool_)
    return pa.table([ids, pieces.astype(np.int64), places.astype(np.int32), chosen], schema=_FOUND)


def _write_rows(group: _Group, dropped: pa.Table, left_out: pa.Table, work: Folder) -> None:
    table = dropped.sort_by([("piece", "ascending"), ("place", "ascending")])
    pieces, places, ids, chosen = (table[name].to_numpy() for name in ("piece", "place", "id", "chosen"))
    GroupDecisions.write_rows(work, group.number, left_out_rows(pieces, places, ids, chosen, left_out))


def _write_images(group: _Group, repeated: pa.Table, work: Folder) -> None:
    """What is not wanted, and what an earlier piece has."""
    rows = GroupDecisions.read_rows(work, group.number)
    pieces, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for ledger in read_ledgers(work, group.pieces):
        drop = ~wanted_images(ledger, GroupDecisions.kept(rows, ledger))
        drop[repeated.filter(pc.equal(repeated["piece"], ledger.piece))["place"].to_numpy()] = True
        found = np.flatnonzero(drop)
        pieces.append(np.full(len(found), ledger.piece))
        places.append(found)
    table = GroupDecisions.image_table(np.concatenate(pieces), np.concatenate(places))
    GroupDecisions.write_images(work, group.number, table)
