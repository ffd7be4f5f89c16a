"""Parts of prepared tables copied, as they are, into a new version of the tables: by Ray tasks, a piece at a time.

Copied rather than linked: another job may write the origin anew in place.
"""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from functools import partial

from fsspec.implementations.local import LocalFileSystem

from pipelines.tables import ray_tasks
from pipelines.tables.manifest import table_parts
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import retry_storage

__all__ = ["copy_parts"]

_PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class _Copy:
    """A part to copy."""

    table: str
    name: str


def copy_parts(source: Folder, target: Folder, table: str) -> int:
    """Copy the parts of a table of ``source`` that ``target`` does not have yet; returns how many there are."""
    names = table_parts(source, table)
    missing = [_Copy(table, name) for name in names if not _is_copied(source, target, table, name)]
    if missing:
        run = partial(_copy, source=source, target=target)
        list(
            ray_tasks.results(
                ray_tasks.task_dataset(missing).map(lambda row: ray_tasks.attempt(run, row[ray_tasks.TASK]))
            )
        )
    return len(names)


def _is_copied(source: Folder, target: Folder, table: str, name: str) -> bool:
    if not target.exists(table, name):
        return False
    return bool(source.fs.size(source.path(table, name)) == target.fs.size(target.path(table, name)))


def _copy(task: _Copy, *, source: Folder, target: Folder) -> None:
    retry_storage(f"{task.table}/{task.name}", lambda: _copy_once(task, source, target))


def _copy_once(task: _Copy, source: Folder, target: Folder) -> None:
    """Copy one part; a reader sees all of it or nothing."""
    local = isinstance(target.fs, LocalFileSystem)
    path = f"{task.name}.{uuid.uuid4().hex}.partial" if local else task.name  # an object appears when it is complete
    with source.open(task.table, task.name) as origin, target.open(task.table, path, mode="wb") as copy:
        shutil.copyfileobj(origin, copy, _PIECE_BYTES)
    if local:
        os.replace(target.path(task.table, path), target.path(task.table, task.name))
