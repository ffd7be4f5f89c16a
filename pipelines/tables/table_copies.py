"""Parts of prepared tables copied, as they are, into a new version of the tables: by Ray tasks, a piece at a time.

Copied rather than linked: another job may write the origin anew in place.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from typing import IO

from pipelines.tables import ray_tasks
from pipelines.tables.manifest import table_parts
from pipelines.tables.storage import Folder

__all__ = ["copy_parts"]

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
    if missing:
        run = partial(_copy, source=source, target=target)
        copies = ray_tasks.task_dataset(missing).map(lambda row: ray_tasks.attempt(run, row[ray_tasks.TASK]))
        for _ in ray_tasks.results(copies):
            pass
    return len(names)


def _copy(task: _Copy, *, source: Folder, target: Folder) -> None:
    def write(copy: IO[bytes]) -> None:
        with source.open(task.table, task.name) as origin:
            shutil.copyfileobj(origin, copy, _PIECE_BYTES)

    target.write_stream(write, task.table, task.name)
