"""Records of a corpus brought together by bucket, in as many Ray Data shuffles as fit the cluster.

To make the records a task reads a part of the corpus, decodes pictures and hashes texts, so that it is done once: each
task writes a file of its records, and after an interruption only tasks without one run again. Every shuffle then reads
its buckets from these files. Ray Data holds what it shuffles in actors, so that a shuffle takes no more than fits them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.data.grouped_data import GroupedData

from pipelines.tables import ray_tasks
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["Buckets", "collected", "shuffled"]

_T = TypeVar("_T")
_BATCH_RECORDS = 2**16
_TOGETHER = 8
"""Files that one task of a shuffle reads, if there are so many."""


@dataclass(frozen=True)
class Buckets:
    """How records are divided: one shuffle takes every ``shuffles``-th bucket."""

    count: int
    shuffles: int

    @classmethod
    def of(cls, records: int, per_bucket: int, ids_per_record: int) -> Buckets:
        """Buckets for about so many records.

        Args:
            per_bucket: records that a task holds at once.
            ids_per_record: how many ids, as ``ray_tasks.shuffle_rounds`` counts them, take the memory of a record.
        """
        shuffles = ray_tasks.shuffle_rounds(records * ids_per_record)
        return cls(shuffles * max(4, -(-records // (shuffles * per_bucket))), shuffles)


def collected(tasks: Sequence[_T], records: Callable[[_T], Iterable[pa.Table]], schema: pa.Schema) -> pa.Table:
    """The records of all tasks in the driver, in any order, where they are few."""
    found = ray_tasks.stream(lambda task: pa.concat_tables([schema.empty_table(), *records(task)]), tasks)
    return pa.concat_tables([schema.empty_table(), *found])


def shuffled(
    tasks: Sequence[_T],
    records: Callable[[_T], Iterable[pa.Table]],
    schema: pa.Schema,
    buckets: Buckets,
    scratch: Folder,
) -> Iterator[GroupedData]:
    """The records of all tasks, grouped by their column ``bucket``: a shuffle at a time.

    Args:
        records: of a task, in a worker; tables of ``schema``, whose column ``bucket`` is below ``buckets.count``.
        scratch: a folder for the records, which stay there. What an interrupted run left there is used.
    """
    place = scratch.child(f"{buckets.count}-{buckets.shuffles}")  # a larger cluster divides in another way
    write = partial(_write, records=records, schema=schema, shuffles=buckets.shuffles, place=place)
    there = set(place.files(".arrow"))
    waiting = [(number, task) for number, task in enumerate(tasks) if _file(number) not in there]
    for _ in ray_tasks.stream(write, waiting):
        pass
    for number in range(buckets.shuffles):
        read = partial(_read, place=place, shuffle=number, shuffles=buckets.shuffles)
        yield (
            ray_tasks.task_dataset(range(len(tasks)), together=_TOGETHER)
            .map_batches(read, batch_size=1)
            .groupby("bucket", num_partitions=buckets.count // buckets.shuffles)
        )


def _write(
    task: tuple[int, _T],
    *,
    records: Callable[[_T], Iterable[pa.Table]],
    schema: pa.Schema,
    shuffles: int,
    place: Folder,
) -> None:
    """In a worker: batches of the records of a task, in turn for each of the shuffles."""

    def write(file: IO[bytes]) -> None:
        with pa.ipc.new_file(file, schema) as writer:
            for table in _joined(records(task[1])):
                shuffle = table["bucket"].to_numpy() % shuffles
                for number in range(shuffles):
                    chosen = table.filter(pa.array(shuffle == number)).combine_chunks().to_batches()
                    writer.write_batch(chosen[0] if chosen else pa.RecordBatch.from_pylist([], schema=schema))

    place.write_stream(write, _file(task[0]))


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same records in tables that are not small."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= _BATCH_RECORDS:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _read(batch: dict[str, NDArray[Any]], *, place: Folder, shuffle: int, shuffles: int) -> pa.Table:
    """In a worker: the records of some tasks for one shuffle."""
    found = []
    for task in batch[ray_tasks.TASK]:
        name = _file(pickle.loads(task))
        found.append(require_storage(f"reading {place.uri}/{name}", partial(_records, place, name, shuffle, shuffles)))
    return pa.concat_tables(found)


def _records(place: Folder, name: str, shuffle: int, shuffles: int) -> pa.Table:
    with place.open(name) as opened, pa.ipc.open_file(opened) as file:
        numbers = np.arange(shuffle, file.num_record_batches, shuffles).tolist()
        return pa.Table.from_batches([file.get_batch(number) for number in numbers], schema=file.schema)


def _file(task: int) -> str:
    return f"{task:06d}.arrow"
