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
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crem.errors import ConfigError
from pipelines.corpus.publish import foreign_files
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

__all__ = ["Verification", "verify"]

_HERE_IDS = 20_000_000
_SHOWN = 20
"""Faults of one kind that are named one by one."""
_ROW, _IMAGE, _REFERENCE = 0, 1, 2
_SEEN = pa.schema([("id", pa.int64()), ("kind", pa.int8()), ("part", pa.int32())])


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


@dataclass(frozen=True)
class _PartReport:
    """What a task found in one part."""

    number: int
    rows: int = 0
    faults: tuple[str, ...] = ()
    by_stage: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Of a part of ``rejected``: rows by stage and reason."""
    by_split_task: Counter[str] = field(default_factory=Counter)
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
    parts = list(read_part_files(folder, manifest))
    faults = _files_present(folder, parts)
    faults += [f"{name} does not belong to the tables" for name in foreign_files(folder, manifest)]
    session.connect()
    require_readable_tables(prepared)
    with ray_tasks.remote_errors():
        tasks = [_PartTask(number, part) for number, part in enumerate(parts)]
        run = partial(_check_part, folder=folder)
        reports = sorted(ray_tasks.stream(run, tasks), key=lambda report: report.number)
        faults += [fault for report in reports for fault in report.faults]
        faults += _check_counts(manifest, parts, reports)
        readable = [task for task, report in zip(tasks, reports, strict=True) if report.readable]
        with_ids = [task for task in readable if task.part.table != "rejected"]
        all_images = sum(task.part.table == "images" for task in readable) == sum(p.table == "images" for p in parts)
        if sum(task.part.rows for task in with_ids) <= _HERE_IDS:
            found = suspects_here(folder, with_ids)
        else:
            found = suspects_by_shuffle(folder, with_ids)
        faults += _id_faults(found, parts, check_references=all_images)
    counted = Counter(dict.fromkeys(TABLES, 0))
    for task, report in zip(tasks, reports, strict=True):
        counted[task.part.table] += report.rows
    return Verification(len(parts), counted["rows"], counted["images"], counted["rejected"], tuple(faults))


def _files_present(folder: Folder, parts: list[PartFile]) -> list[str]:
    stored = {table: folder.child(table).sizes() for table in TABLES}
    missing = [part for part in parts if part.name not in stored[part.table]]
    return [f"{part.table}/{part.name} is missing" for part in missing]


def _check_part(task: _PartTask, *, folder: Folder) -> _PartReport:
    """In a worker: read one part whole."""
    part, name = task.part, f"{task.part.table}/{task.part.name}"
    try:
        data = folder.read_bytes(part.table, part.name)
    except FileNotFoundError:
        return _PartReport(task.number)  # that it is missing is said already
    faults = []
    if len(data) != part.bytes:
        faults.append(f"{name} has {len(data)} bytes and was written with {part.bytes}")
    elif hashlib.blake2b(data, digest_size=16).hexdigest() != part.checksum:
        faults.append(f"{name} is damaged: its checksum is not the one with which it was written")
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        return _PartReport(task.number, faults=(*faults, f"{name} cannot be read: {error}"))
    if not table.schema.equals(TABLES[part.table]):
        return _PartReport(task.number, table.num_rows, (*faults, f"{name} has another schema"))
    if table.num_rows != part.rows:
        faults.append(f"{name} has {table.num_rows} rows and was written with {part.rows}")
    by_stage: Counter[tuple[str, str]] = Counter()
    by_split_task: Counter[str] = Counter()
    if part.table == "images":
        pairs = zip(table["id"].to_pylist(), table["bytes"], strict=True)
        wrong = [image for image, stored in pairs if schema.content_id(stored.as_buffer()) != image]
        faults += [f"{name}: the id of image {image} is not the hash of its bytes" for image in wrong[:_SHOWN]]
    elif part.table == "rejected":
        by_stage.update(zip(table["stage"].to_pylist(), table["reason"].to_pylist(), strict=True))
    else:
        counts = pc.value_counts(pc.binary_join_element_wise(table["split"], table["task"], "/"))
        by_split_task.update({count["values"]: count["counts"] for count in counts.to_pylist()})
    return _PartReport(task.number, table.num_rows, tuple(faults), by_stage, by_split_task, readable=True)


def _check_counts(manifest: PrepareManifest, parts: list[PartFile], reports: list[_PartReport]) -> list[str]:
    """The manifest against what is stored, and its own sums."""
    rows = dict.fromkeys(TABLES, 0)
    for part, report in zip(parts, reports, strict=True):
        rows[part.table] += report.rows
    by_stage = sum((report.by_stage for report in reports), Counter[tuple[str, str]]())
    by_split_task = sum((report.by_split_task for report in reports), Counter[str]())
    filtered = sum(count for (stage, _), count in by_stage.items() if stage in FILTER_STAGES)
    by_reason: Counter[str] = Counter()
    for (_, reason), count in by_stage.items():
        by_reason[reason] += count
    found = {
        "rows_out": rows["rows"],
        "images": rows["images"],
        "rejected": rows["rejected"] - filtered,
        "filtered": filtered,
        "by_reason": dict(sorted(by_reason.items())),
        "by_split_task": dict(sorted(by_split_task.items())),
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
    for part in parts:
        digest.update(f"{part.table}\0{part.checksum}\n".encode())
    if digest.hexdigest() != manifest.tables_checksum:
        faults.append(f"{manifest.files} is not the list of parts with which {manifest.FILE} was written")
    return faults


def _ids(task: _PartTask, *, folder: Folder) -> pa.Table:
    """In a worker: the ids of a part, and those that its rows name, as ``_SEEN``."""
    with folder.open(task.part.table, task.part.name) as file:
        columns = ["id"] if task.part.table == "images" else ["id", "query", "target", "negatives"]
        table = pq.ParquetFile(file).read(columns=columns)
    own = table["id"].combine_chunks()
    tables = [_seen(own, _IMAGE if task.part.table == "images" else _ROW, task.number)]
    if task.part.table == "rows":
        sides = [table["query"], table["target"], pc.list_flatten(table["negatives"])]
        for side in sides:
            named = pc.list_flatten(pc.struct_field(side.combine_chunks(), "images"))
            tables.append(_seen(pc.unique(named), _REFERENCE, task.number))
    return pa.concat_tables(tables)


def _seen(ids: pa.Array, kind: int, part: int) -> pa.Table:
    kinds, parts = pa.array(np.full(len(ids), kind, np.int8)), pa.array(np.full(len(ids), part, np.int32))
    return pa.table([ids, kinds, parts], schema=_SEEN)


def suspects_here(folder: Folder, tasks: Iterable[_PartTask]) -> pa.Table:
    """The entries of ``_SEEN`` that are at fault, found in the driver."""
    tables = list(ray_tasks.stream(partial(_ids, folder=folder), tasks))
    return _at_fault(pa.concat_tables([_SEEN.empty_table(), *tables]))


def suspects_by_shuffle(folder: Folder, tasks: list[_PartTask], *, ids_per_bucket: int = 2_000_000) -> pa.Table:
    """The same of any number of ids: a shuffle brings equal ids together, and only what is at fault comes here."""
    buckets = 1 + sum(task.part.rows for task in tasks) // ids_per_bucket

    def read(batch: pa.Table) -> pa.Table:
        tables = [_ids(pickle.loads(task), folder=folder) for task in batch[ray_tasks.TASK].to_pylist()]
        table = pa.concat_tables([_SEEN.empty_table(), *tables])
        return table.append_column("bucket", pa.array(table["id"].to_numpy() % buckets))

    shuffled = (
        ray_tasks.task_dataset(tasks)
        .map_batches(read, batch_size=1, batch_format="pyarrow")
        .groupby("bucket")
        .map_groups(lambda group: _at_fault(group.select(_SEEN.names)), batch_format="pyarrow")
    )
    tables = [batch.cast(_SEEN) for batch in shuffled.iter_batches(batch_format="pyarrow") if batch.num_rows]
    return pa.concat_tables([_SEEN.empty_table(), *tables])


def _at_fault(seen: pa.Table) -> pa.Table:
    """Rows and images whose id another one has, and references to images that are not there."""
    ids, kinds = seen["id"].to_numpy(), seen["kind"].to_numpy()
    wrong = np.zeros(len(ids), np.bool_)
    for kind in (_ROW, _IMAGE):
        at = np.flatnonzero(kinds == kind)
        _, inverse, counts = np.unique(ids[at], return_inverse=True, return_counts=True)
        wrong[at] = counts[inverse] > 1
    wrong |= (kinds == _REFERENCE) & ~np.isin(ids, ids[kinds == _IMAGE])
    return seen.filter(pa.array(wrong))


def _id_faults(found: pa.Table, parts: list[PartFile], *, check_references: bool) -> list[str]:
    """A line for each id at fault, up to a limit, and their number beyond it."""
    files: dict[tuple[int, int], list[str]] = {}
    order = [("kind", "ascending"), ("id", "ascending"), ("part", "ascending")]
    for entry in found.sort_by(order).to_pylist():
        part = parts[entry["part"]]
        files.setdefault((entry["kind"], entry["id"]), []).append(f"{part.table}/{part.name}")
    lines: list[str] = []
    for kind, says in ((_ROW, "has the row id"), (_IMAGE, "has the image"), (_REFERENCE, "names the image")):
        faults = [(number, names) for (found_kind, number), names in files.items() if found_kind == kind]
        if kind == _REFERENCE and not check_references:
            continue
        for number, names in faults[:_SHOWN]:
            what = ", which is not there" if kind == _REFERENCE else f" {len(names)} times"
            lines.append(f"{' and '.join(dict.fromkeys(names))} {says} {number}{what}")
        if len(faults) > _SHOWN:
            lines.append(f"and {len(faults) - _SHOWN} more: {says}")
    return lines
