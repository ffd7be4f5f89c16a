"""``crem verify``: whether prepared tables are what their manifest says, from what is stored alone.

Each part is read by one Ray Data task, which checks the bytes of the file against its checksum, the number of its
rows, its schema, and the id of each image against the hash of its bytes. That ids are unique, and that every image
that a row names is there, is decided on the ids: with NumPy in the driver up to ``_HERE_IDS`` of them, above it by a
Ray Data shuffle that brings equal ids together. A fault names the file that has it.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crem.errors import ConfigError
from pipelines.corpus.publish import foreign_files
from pipelines.corpus.table_statistics import Counts, is_bounded, split_tasks, sum_by_split_task
from pipelines.tables import ray_tasks, schema, session
from pipelines.tables.manifest import (
    FILTER_STAGES,
    TABLES,
    PartFile,
    PrepareManifest,
    read_manifest,
    read_part_files,
)
from pipelines.tables.shared_folders import require_readable_tables
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["Verification", "verify"]

_HERE_IDS = 2_000_000
"""Ids that the driver compares; 60 bytes each while it does so."""
_SHUFFLE_TASKS = 4096
"""Tasks at most to which the parts are put together for a shuffle: Ray Data keeps some 10 KB of each in the driver."""
_GROUPS = 16
"""Row groups of rows that are decoded at once."""
_SHOWN = 20
"""Faults of one kind that are named one by one."""
_NAMED_PARTS = 4
"""Parts that are named in the fault of one id."""
_ROW, _IMAGE, _REFERENCE = 0, 1, 2
_SEEN = pa.schema([("id", pa.int64()), ("kind", pa.int8()), ("part", pa.int32())])
_AT_FAULT = pa.schema(
    [
        ("kind", pa.int8()),
        ("id", pa.int64()),
        ("count", pa.int64()),  # how often it was seen
        ("parts", pa.list_(pa.int32())),  # the first ``_NAMED_PARTS``; none: ``count`` ids of the kind are at fault
    ]
)


@dataclass(frozen=True)
class Verification:
    """What was found."""

    parts: int
    rows: int
    images: int
    rejected: int
    faults: tuple[str, ...]
    """A line each; empty where all is well."""


@dataclass(frozen=True)
class _PartTask:
    number: int
    part: PartFile


@dataclass(frozen=True, slots=True)
class _PartIds:
    """A part that can be read, and has ids."""

    number: int
    table: str
    name: str
    rows: int


@dataclass(frozen=True)
class _PartReport:
    """What a task found in one part."""

    number: int
    table: str
    rows: int = 0
    faults: tuple[str, ...] = ()
    by_stage: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Of a part of ``rejected``: rows by stage and reason."""
    by_split_task: Counts = field(default_factory=dict)
    """Of a part of ``rows``."""
    readable: bool = False


def verify(prepared: str) -> Verification:
    """Check the prepared tables at a path or URI.

    Raises:
        ConfigError: there is no manifest, or its list of parts cannot be read.
    """
    folder = Folder.at(prepared).patient(60.0)
    manifest = read_manifest(folder)
    if not manifest.files:
        raise ConfigError(f"{prepared!r} was prepared before parts had checksums; prepare it again to verify it")
    faults = _files_present(folder, manifest)
    faults += [f"{name} does not belong to the tables" for name in foreign_files(folder, manifest)]
    session.connect()
    require_readable_tables(prepared)
    with ray_tasks.remote_errors():
        found = _Found()
        for report in ray_tasks.stream(partial(_check_part, folder=folder), _tasks(folder, manifest)):
            found.add(report)
        faults += [fault for _, lines in sorted(found.faults.items()) for fault in lines]
        faults += _check_counts(folder, manifest, found)
        with_ids = [
            _PartIds(task.number, task.part.table, task.part.name, task.part.rows)
            for task in _tasks(folder, manifest)
            if task.number not in found.unreadable and task.part.table != "rejected"
        ]
        suspects = suspects_here if found.rows["rows"] + found.rows["images"] <= _HERE_IDS else suspects_by_shuffle
        faults += _id_faults(suspects(folder, with_ids), folder, manifest, found)
    return Verification(found.parts, found.rows["rows"], found.rows["images"], found.rows["rejected"], tuple(faults))


def _tasks(folder: Folder, manifest: PrepareManifest) -> Iterator[_PartTask]:
    return (_PartTask(number, part) for number, part in enumerate(read_part_files(folder, manifest)))


class _Found:
    """The sum of the reports on all parts."""

    def __init__(self) -> None:
        self.parts = 0
        self.rows = dict.fromkeys(TABLES, 0)
        self.faults: dict[int, tuple[str, ...]] = {}
        """By number of the part."""
        self.unreadable: set[int] = set()
        self.unreadable_images = False
        self.by_stage: Counter[tuple[str, str]] = Counter()
        self.by_split_task: Counts = {}

    def add(self, report: _PartReport) -> None:
        """Add a report, in any order."""
        self.parts += 1
        self.rows[report.table] += report.rows
        if report.faults:
            self.faults[report.number] = report.faults
        if not report.readable:
            self.unreadable.add(report.number)
            self.unreadable_images |= report.table == "images"
        self.by_stage.update(report.by_stage)
        self.by_split_task = sum_by_split_task(self.by_split_task, report.by_split_task)


def _files_present(folder: Folder, manifest: PrepareManifest) -> list[str]:
    stored = {table: folder.child(table).sizes() for table in TABLES}
    missing = (part for part in read_part_files(folder, manifest) if part.name not in stored[part.table])
    return [f"{part.table}/{part.name} is missing" for part in missing]


def _check_part(task: _PartTask, *, folder: Folder) -> _PartReport:
    """In a worker: read one part whole; its bytes and a few of its row groups are in memory."""
    part, name = task.part, f"{task.part.table}/{task.part.name}"
    try:
        data = folder.read_bytes(part.table, part.name)
    except FileNotFoundError:
        return _PartReport(task.number, part.table)  # that it is missing is said already
    faults = []
    if len(data) != part.bytes:
        faults.append(f"{name} has {len(data)} bytes and was written with {part.bytes}")
    elif hashlib.blake2b(data, digest_size=16).hexdigest() != part.checksum:
        faults.append(f"{name} is damaged: its checksum is not the one with which it was written")
    rows, wrong = 0, []
    by_stage: Counter[tuple[str, str]] = Counter()
    by_split_task: Counts = {}
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if not file.schema_arrow.equals(TABLES[part.table]):
            return _PartReport(task.number, part.table, file.metadata.num_rows, (*faults, f"{name} has another schema"))
        for table in _row_groups(file, 1 if part.table == "images" else _GROUPS):
            rows += table.num_rows
            if part.table == "images":
                pairs = zip(table["id"].to_pylist(), table["bytes"], strict=True)
                wrong += [image for image, stored in pairs if schema.content_id(stored.as_buffer()) != image]
            elif part.table == "rejected":
                by_stage.update(zip(table["stage"].to_pylist(), table["reason"].to_pylist(), strict=True))
            else:
                by_split_task = sum_by_split_task(by_split_task, split_tasks(table))
    except (pa.ArrowException, OSError) as error:
        return _PartReport(task.number, part.table, faults=(*faults, f"{name} cannot be read: {error}"))
    faults += [f"{name}: the id of image {image} is not the hash of its bytes" for image in wrong[:_SHOWN]]
    if rows != part.rows:
        faults.append(f"{name} has {rows} rows and was written with {part.rows}")
    return _PartReport(task.number, part.table, rows, tuple(faults), by_stage, by_split_task, readable=True)


def _row_groups(file: pq.ParquetFile, together: int) -> Iterator[pa.Table]:
    for start in range(0, file.num_row_groups, together):
        yield file.read_row_groups(range(start, min(file.num_row_groups, start + together)), use_threads=False)


def _check_counts(folder: Folder, manifest: PrepareManifest, seen: _Found) -> list[str]:
    """The manifest against what is stored, and its own sums."""
    rows, by_stage = seen.rows, seen.by_stage
    filtered = sum(count for (stage, _), count in by_stage.items() if stage in FILTER_STAGES)
    by_reason: Counter[str] = Counter()
    for (_, reason), count in by_stage.items():
        by_reason[reason] += count
    names = dict(sorted(seen.by_split_task.items()))
    if is_bounded(manifest.by_split_task) and sum(names.values()) == sum(manifest.by_split_task.values()):
        names = manifest.by_split_task  # which of many names are counted one by one depends on the order of sums
    found = {
        "rows_out": rows["rows"],
        "images": rows["images"],
        "rejected": rows["rejected"] - filtered,
        "filtered": filtered,
        "by_reason": dict(sorted(by_reason.items())),
        "by_split_task": names,
    }
    faults = [
        f"{manifest.FILE} says {name} = {getattr(manifest, name)} and the tables have {value}"
        for name, value in found.items()
        if getattr(manifest, name) != value
    ]
    if manifest.rows_in != manifest.rows_out + manifest.rejected + manifest.filtered:
        faults.append(
            f"{manifest.FILE}: {manifest.rows_in} rows in are not {manifest.rows_out} out + {manifest.rejected} "
            f"rejected + {manifest.filtered} filtered"
        )
    digest = hashlib.blake2b(digest_size=16)
    for part in read_part_files(folder, manifest):
        digest.update(f"{part.table}\0{part.checksum}\n".encode())
    if digest.hexdigest() != manifest.tables_checksum:
        faults.append(f"{manifest.files} is not the list of parts with which {manifest.FILE} was written")
    return faults


def _ids(task: _PartIds, *, folder: Folder) -> pa.Table:
    """In a worker: the ids of a part, and those that its rows name, as ``_SEEN``."""
    sides = ["query", "target", "negatives.list.element"]
    columns = ["id", *(f"{side}.images" for side in sides if task.table == "rows")]

    def read() -> pa.Table:
        with folder.open(task.table, task.name) as file:
            return pq.ParquetFile(file).read(columns=columns, use_threads=False)

    table = require_storage(f"reading {folder.uri}/{task.table}/{task.name}", read)
    tables = [_seen(table["id"].combine_chunks(), _IMAGE if task.table == "images" else _ROW, task.number)]
    if task.table == "rows":
        for side in (table["query"], table["target"], pc.list_flatten(table["negatives"])):
            named = pc.list_flatten(pc.struct_field(side.combine_chunks(), "images"))
            tables.append(_seen(pc.unique(named), _REFERENCE, task.number))
    return pa.concat_tables(tables)


def _seen(ids: pa.Array, kind: int, part: int) -> pa.Table:
    kinds, parts = pa.array(np.full(len(ids), kind, np.int8)), pa.array(np.full(len(ids), part, np.int32))
    return pa.table([ids, kinds, parts], schema=_SEEN)


def suspects_here(folder: Folder, tasks: list[_PartIds]) -> pa.Table:
    """``_AT_FAULT`` of some parts, found in the driver."""
    tables = list(ray_tasks.stream(partial(_ids, folder=folder), tasks))
    return _at_fault(pa.concat_tables([_SEEN.empty_table(), *tables]))


def suspects_by_shuffle(folder: Folder, tasks: list[_PartIds]) -> pa.Table:
    """The same of any number of ids: shuffles bring equal ids together, and a few faults of each bucket come here.

    Each shuffle takes a share of the ids that fits the CPUs, and the parts are read once for each.
    """
    rounds, buckets = ray_tasks.shuffle_rounds(sum(task.rows for task in tasks)), ray_tasks.shuffle_buckets()
    together = -(-len(tasks) // _SHUFFLE_TASKS)
    bundles = [tasks[start : start + together] for start in range(0, len(tasks), together)]
    tables = [_AT_FAULT.empty_table()]
    for number in range(rounds):

        def read(batch: dict[str, NDArray[Any]], number: int = number) -> Iterator[pa.Table]:
            for task in (task for bundle in batch[ray_tasks.TASK] for task in pickle.loads(bundle)):
                table = _ids(task, folder=folder)
                table = table.filter(pa.array(table["id"].to_numpy() % rounds == number))
                yield table.append_column("bucket", pa.array(table["id"].to_numpy() // rounds % buckets))

        shuffled = (
            ray_tasks.task_dataset(bundles)
            .map_batches(read, batch_size=1)
            .groupby("bucket", num_partitions=buckets)
            .map_groups(lambda bucket: _at_fault(bucket.select(_SEEN.names)), batch_format="pyarrow")
        )
        tables += [batch.cast(_AT_FAULT) for batch in shuffled.iter_batches(batch_format="pyarrow") if batch.num_rows]
    return pa.concat_tables(tables)


def _at_fault(seen: pa.Table) -> pa.Table:
    """Rows and images whose id another one has, and references to images that are not there: a few, and how many."""
    ids, kinds, parts = (seen[name].to_numpy() for name in _SEEN.names)
    found: list[dict[str, object]] = []
    for kind in (_ROW, _IMAGE, _REFERENCE):
        of_kind = kinds == kind
        if kind == _REFERENCE:
            of_kind &= ~np.isin(ids, ids[kinds == _IMAGE])
        values, counts = np.unique(ids[of_kind], return_counts=True)
        wrong = (counts > 1) | (kind == _REFERENCE)
        if wrong.any():
            found.append({"kind": kind, "id": 0, "count": int(wrong.sum()), "parts": []})
        for value, count in zip(values[wrong][:_SHOWN].tolist(), counts[wrong][:_SHOWN].tolist(), strict=True):
            where = np.unique(parts[of_kind & (ids == value)])[:_NAMED_PARTS]
            found.append({"kind": kind, "id": value, "count": count, "parts": where.tolist()})
    return pa.Table.from_pylist(found, schema=_AT_FAULT)


def _id_faults(suspects: pa.Table, folder: Folder, manifest: PrepareManifest, seen: _Found) -> list[str]:
    """A line for each id at fault, up to a limit, and their number beyond it."""
    entries = sorted(suspects.to_pylist(), key=lambda entry: (entry["kind"], entry["id"]))
    numbers = {part for entry in entries for part in entry["parts"]}
    names = {t.number: f"{t.part.table}/{t.part.name}" for t in _tasks(folder, manifest) if t.number in numbers}
    lines: list[str] = []
    for kind, says in ((_ROW, "has the row id"), (_IMAGE, "has the image"), (_REFERENCE, "names the image")):
        if kind == _REFERENCE and seen.unreadable_images:
            continue
        of_kind = [entry for entry in entries if entry["kind"] == kind]
        for entry in [entry for entry in of_kind if entry["parts"]][:_SHOWN]:
            what = ", which is not there" if kind == _REFERENCE else f" {entry['count']} times"
            lines.append(f"{' and '.join(names[part] for part in entry['parts'])} {says} {entry['id']}{what}")
        total = sum(entry["count"] for entry in of_kind if not entry["parts"])
        if total > _SHOWN:
            lines.append(f"and {total - _SHOWN} more: {says}")
    return lines
