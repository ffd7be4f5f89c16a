"""A new version of prepared tables: its own rows, the images of the origin, and a manifest that tells both.

The images are copied, not linked: another job may write the origin anew in place.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from pipelines.tables import ray_tasks, schema
from pipelines.tables.manifest import TABLES, PartFile, PrepareManifest, table_parts, write_part_files
from pipelines.tables.part_reads import read_part
from pipelines.tables.storage import Folder, JobKind

__all__ = ["complete_version", "copy_parts", "parquet_bytes"]

_PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class _Copy:
    """A part to copy."""

    table: str
    name: str


def copy_parts(source: Folder, target: Folder, table: str) -> int:
    """Copy the parts of a table of ``source`` that ``target`` does not have yet; returns how many there are.

    ``target`` should be patient: storage that fails in mid-copy makes the copy begin anew.
    """
    names = table_parts(source, table)
    sizes, copied = source.child(table).sizes(), target.child(table).sizes()
    missing = [_Copy(table, name) for name in names if copied.get(name) != sizes[name]]
    for _ in ray_tasks.stream(partial(_copy, source=source, target=target), missing):
        pass
    return len(names)


def complete_version(
    origin: PrepareManifest,
    source: Folder,
    target: Folder,
    kind: JobKind,
    *,
    rows: int,
    by_split_task: Mapping[str, int],
    settings: Mapping[str, JsonValue],
    package: str,
) -> None:
    """Write what makes the tables in ``target`` complete; no row was rejected.

    Args:
        origin: manifest of the tables in ``source``.
        rows: in and out.
        settings: what the job did and with what, for the manifest's ``config``.
        package: the one beside Ray and PyArrow that decides what was made.
    """
    target.write_bytes(parquet_bytes(schema.REJECTED.empty_table()), "rejected", "part-000000.parquet")
    parts = _part_files(target)
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part.table}\0{part.checksum}\n".encode())
    write_part_files(target, f"files-{digest.hexdigest()}.parquet", parts)
    PrepareManifest(
        files=f"files-{digest.hexdigest()}.parquet",
        tables_checksum=digest.hexdigest(),
        kind=kind,
        rows_in=rows,
        rows_out=rows,
        rejected=0,
        images=origin.images,
        images_shrunk=origin.images_shrunk,
        images_truncated=origin.images_truncated,
        largest_source_pixels=origin.largest_source_pixels,
        by_reason={},
        by_split_task=dict(sorted(by_split_task.items())),
        source_uri=source.uri,
        created_with={"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("ray", "pyarrow", package)},
        config=origin.config | {kind.value: dict(settings) | {"source_id": origin.content_id}},
    ).write(target)


def _part_files(target: Folder) -> list[PartFile]:
    """All parts with their checksums: read once more, from the storage, by a task each."""
    tasks = [_Copy(table, name) for table in TABLES for name in target.child(table).files(".parquet")]
    found = ray_tasks.stream(partial(_part_file, target=target), tasks)
    return sorted(found, key=lambda part: (list(TABLES).index(part.table), part.name))


def _part_file(task: _Copy, *, target: Folder) -> PartFile:
    return read_part(target.child(task.table), task.name, lambda: _summed(task, target))


def _summed(task: _Copy, target: Folder) -> PartFile:
    digest, size = hashlib.blake2b(digest_size=16), 0
    with target.open(task.table, task.name) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
    with target.open(task.table, task.name) as file:
        rows = pq.ParquetFile(file).metadata.num_rows
    return PartFile(table=task.table, name=task.name, rows=rows, bytes=size, checksum=digest.hexdigest())


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file whose pages carry checksums, in row groups of the size that training reads."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, row_group_size=schema.ROWS_ROW_GROUP_ROWS)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _copy(task: _Copy, *, source: Folder, target: Folder) -> None:
    def write(copy: IO[bytes]) -> None:
        with source.open(task.table, task.name) as origin:
            shutil.copyfileobj(origin, copy, _PIECE_BYTES)

    target.write_stream(write, task.table, task.name)
