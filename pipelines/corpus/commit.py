"""Staged files become the final tables: cut, written and summed up group by group, a Ray Data task each.

The driver holds the places of the cuts, 16 bytes a part, and the sums of the groups. Receipts are read by tasks, and
the list of parts stands in files of the work folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TypeVar

from pipelines.corpus.part_cuts import GroupCuts, PartTask, cut_group, part_tasks
from pipelines.corpus.part_writer import CommittedPart, receipt_file, write_empty_part, write_part
from pipelines.corpus.table_statistics import TableStatistics
from pipelines.corpus.work_plan import WorkPlan, each_group
from pipelines.formats.unknown_columns import UnknownColumns
from pipelines.tables import ray_tasks
from pipelines.tables.manifest import TABLES, PartFile, listed_parts, write_part_files
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder

__all__ = ["Committed", "CommittedParts", "commit"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class CommittedParts:
    """The parts of all tables in order, read from the work folder a group at a time."""

    work: Folder
    groups: tuple[int, ...]
    empty: tuple[PartFile, ...]
    """Those of tables that have no row."""

    def __iter__(self) -> Iterator[PartFile]:
        for group in self.groups:
            yield from listed_parts(self.work, _parts_file(group))
        yield from self.empty


@dataclass(frozen=True)
class Committed:
    """What was written."""

    rows_in: int
    unknown: UnknownColumns
    statistics: TableStatistics
    parts: CommittedParts


def commit(plan: WorkPlan, *, out: Folder, work: Folder, version: str, after_each: Callable[[], None]) -> Committed:
    """Write all parts that have no receipt yet.

    Args:
        after_each: called after each result of a task.
    """

    def heard(results: Iterable[_T]) -> Iterator[_T]:
        for result in results:
            after_each()
            yield result

    cuts = sorted(
        heard(each_group(partial(cut_group, work=work, plan=plan), range(plan.groups))), key=lambda found: found.group
    )
    records = sum(found.records for found in cuts)
    if records != plan.records:
        raise RuntimeError(f"the plan has {plan.records} records and {records} were read")
    for _ in heard(ray_tasks.stream(partial(write_part, out=out, work=work, version=version), _waiting(cuts, work))):
        pass
    sums = sorted(heard(each_group(partial(_sum_group, work=work), list(_groups(cuts)))), key=lambda found: found.group)
    statistics, unknown = TableStatistics(), UnknownColumns()
    for found in cuts:
        unknown.merge(found.unknown)
    for of_group in sums:
        statistics += of_group.statistics
    tables = {table for of_group in sums for table in of_group.tables}
    empty = tuple(write_empty_part(out, table, version) for table in TABLES if table not in tables)
    rows_in = sum(found.rows_in for found in cuts)
    return Committed(
        rows_in, unknown, statistics, CommittedParts(work, tuple(of_group.group for of_group in sums), empty)
    )


def _waiting(cuts: Sequence[GroupCuts], work: Folder) -> Iterator[PartTask]:
    """The parts that are not written yet."""
    receipts = work.child("receipts")
    groups = receipts.folders()
    written = in_threads(lambda group: receipts.child(group).files(".json"), groups)
    done = {f"receipts/{group}/{name}" for group, names in zip(groups, written, strict=True) for name in names}
    if done:
        log.info("continuing: %d parts are written already", len(done))
    return (task for task in part_tasks(cuts) if receipt_file(task) not in done)


@dataclass(frozen=True)
class _GroupParts:
    group: int
    receipts: tuple[str, ...]


@dataclass(frozen=True)
class _GroupSum:
    group: int
    statistics: TableStatistics
    tables: frozenset[str]
    """Those that have a part."""


def _groups(cuts: Sequence[GroupCuts]) -> Iterator[_GroupParts]:
    for group, tasks in groupby(part_tasks(cuts), key=lambda task: task.group):
        yield _GroupParts(group, tuple(receipt_file(task) for task in tasks))


def _sum_group(task: _GroupParts, *, work: Folder) -> _GroupSum:
    """Add up the receipts of a group, and list its parts."""
    parts = [CommittedPart.model_validate_json(data) for data in in_threads(work.read_bytes, task.receipts)]
    files = [file for part in parts for file in part.files]
    write_part_files(work, _parts_file(task.group), files)
    statistics = sum((part.statistics for part in parts), TableStatistics())
    return _GroupSum(task.group, statistics, frozenset(file.table for file in files))


def _parts_file(group: int) -> str:
    return f"parts/{group:06d}.parquet"
