"""The plan of a preparation: the corpus in *pieces* of rows, as a table in the output's ``_work`` folder.

A piece is what one task stages: neighbouring ranges of rows. How many rows it has depends on the corpus alone, never on
the workers, so that the tables are the same for any number of them. Small corpora get small pieces, so that every core
has work. Files are planned in chunks: in threads here where they are few, in Ray tasks where they are many. Only the
counts of the chunks come back, so the plan of a corpus of any size is never in one process.

A *group* is ``GROUP_PIECES`` neighbouring pieces. Decisions and parts are made group by group, a task each, so that
nothing that grows with the rows of the corpus is in one process.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipelines.sources import sources
from pipelines.sources.records import RowRange
from pipelines.sources.sources import SourceFiles
from pipelines.tables import ray_tasks
from pipelines.tables.json_file import JsonFile
from pipelines.tables.storage import Folder

__all__ = [
    "GROUP_PIECES",
    "WORK",
    "DraftPlan",
    "Piece",
    "WorkPlan",
    "draft_plan",
    "each_group",
    "identity_of",
    "read_pieces",
]

log = logging.getLogger(__name__)

WORK = "_work"
"""Folder of an output in which a preparation works; gone once the output is complete."""
GROUP_PIECES = 256
_MIN_ROWS, _MAX_ROWS = 64, 4096
"""Rows of a piece: the fewest that outweigh the cost of a task, and the most that are cheap to do again."""
_TASK_ROWS = 1024
"""Rows of several small pieces that one Ray task stages. Source: ours."""
_PIECES = 256
"""Pieces that are aimed at between these bounds: enough for a machine of many cores."""
_CHUNK_FILES = 64
_TASK_CHUNKS = 8
"""Chunks that one Ray task plans, where there are many: a chunk is 50 ms of work on local files. Source: ours."""
_HERE_FILES, _HERE_BYTES = 256, 2**30
"""A corpus of more files, or of larger ones, is planned by Ray tasks."""
_S = TypeVar("_S")
_T = TypeVar("_T")
_PLANNED = pa.schema([("records", pa.int64()), ("ranges", pa.string())])


@dataclass(frozen=True)
class Piece:
    """The rows that one task stages."""

    number: int
    """Position of the piece in the order of the corpus."""
    ranges: tuple[RowRange, ...]


class WorkPlan(JsonFile):
    """The index of a plan; written last, its presence means that the plan is complete."""

    FILE: ClassVar[str] = "plan.json"

    records: int
    """Records of the corpus."""
    chunks: tuple[int, ...]
    """Pieces of each chunk."""

    @property
    def pieces(self) -> int:
        return sum(self.chunks)

    @property
    def groups(self) -> int:
        return -(-self.pieces // GROUP_PIECES)

    @property
    def pieces_at_once(self) -> int:
        """How many pieces one Ray task stages at most, where they are small."""
        return max(1, _TASK_ROWS * self.pieces // max(1, self.records))

    def group(self, number: int) -> range:
        """The pieces of a group."""
        return range(number * GROUP_PIECES, min(self.pieces, (number + 1) * GROUP_PIECES))


@dataclass(frozen=True)
class DraftPlan:
    """A corpus of few files, planned before anything is written."""

    chunks: tuple[tuple[tuple[RowRange, ...], ...], ...]
    """Ranges of each piece of each chunk."""

    @property
    def records(self) -> int:
        return sum(part.rows for chunk in self.chunks for ranges in chunk for part in ranges)

    def write(self, work: Folder) -> WorkPlan:
        """Write the plan into the work folder."""
        for number, chunk in enumerate(self.chunks):
            _write_chunk(work, number, chunk)
        return _complete(work, [(len(chunk), _records(chunk)) for chunk in self.chunks])


def identity_of(corpus: SourceFiles, settings: object) -> str:
    """The identity of a plan: of the files of the corpus, and of ``settings``, whatever else decides the output.

    Two preparations of one identity write the same bytes.
    """
    digest = hashlib.blake2b(json.dumps([corpus.root.uri, settings], sort_keys=True).encode(), digest_size=6)
    for file in corpus.files():
        digest.update(f"{file.name}\0{file.size}\0{file.version}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def draft_plan(corpus: SourceFiles, rows: int | None, columns: Sequence[str] | None) -> DraftPlan | None:
    """The plan of a corpus of few files; ``None`` where ``plan_by_tasks`` is to make it.

    Args:
        rows: of a piece; ``None`` takes them from the size of the corpus.
        columns: of ``sources.split``.

    Raises:
        ConfigError: a file cannot be read, or has none of ``columns``.
    """
    sizes = corpus.table["size"].to_pylist() if len(corpus) <= _HERE_FILES else []
    if not sizes or sum(sizes) > _HERE_BYTES:
        return None
    draft = _draft(corpus, rows or _MAX_ROWS, columns)
    finer = _piece_rows(draft.records)
    return draft if rows or finer == _MAX_ROWS else _draft(corpus, finer, columns)


def plan_by_tasks(corpus: SourceFiles, rows: int | None, columns: Sequence[str] | None, work: Folder) -> WorkPlan:
    """Plan a corpus of many files, into the work folder. Raises as ``draft_plan`` does."""
    size = rows or _MAX_ROWS
    while True:
        counts: dict[int, tuple[int, int]] = {}
        tasks = (_ChunkTask(n, chunk, size, columns, work) for n, chunk in enumerate(_chunks(corpus)))
        for number, pieces, records in ray_tasks.stream(_plan_chunk, tasks, together=_TASK_CHUNKS):
            counts[number] = (pieces, records)
        records = sum(records for _, records in counts.values())
        log.info("planned %d records of %d files", records, len(corpus))
        if rows or size == _piece_rows(records):
            return _complete(work, [counts[number] for number in sorted(counts)])
        size = _piece_rows(records)


def each_group(call: Callable[[_S], _T], groups: Sequence[_S]) -> Iterator[_T]:
    """``call`` of each group, in tasks, in any order; of the only one of a small corpus here."""
    return map(call, groups) if len(groups) == 1 else ray_tasks.stream(call, groups)


def read_pieces(work: Folder, plan: WorkPlan) -> Iterator[Piece]:
    """All pieces in order, one chunk of the plan in memory at a time."""
    number = 0
    for chunk in range(len(plan.chunks)):
        table = pq.read_table(pa.BufferReader(work.read_bytes("plan", _chunk_name(chunk))))
        for ranges in table["ranges"].to_pylist():
            yield Piece(number, _ranges_json().validate_json(ranges))
            number += 1


@dataclass(frozen=True)
class _ChunkTask:
    number: int
    files: SourceFiles
    rows: int
    columns: Sequence[str] | None
    work: Folder


def _plan_chunk(task: _ChunkTask) -> tuple[int, int, int]:
    """In a worker: plan a chunk; its number, pieces and records."""
    chunk = tuple(sources.group(sources.split(task.files, task.columns, task.rows), task.rows))
    _write_chunk(task.work, task.number, chunk)
    return task.number, len(chunk), _records(chunk)


def _draft(corpus: SourceFiles, rows: int, columns: Sequence[str] | None) -> DraftPlan:
    chunks = (tuple(sources.group(sources.split(files, columns, rows), rows)) for files in _chunks(corpus))
    return DraftPlan(tuple(chunks))


def _piece_rows(records: int) -> int:
    return min(_MAX_ROWS, max(_MIN_ROWS, -(-records // _PIECES)))


def _chunks(corpus: SourceFiles) -> Iterator[SourceFiles]:
    for start in range(0, len(corpus), _CHUNK_FILES):
        yield corpus.chunk(start, min(len(corpus), start + _CHUNK_FILES))


def _records(chunk: Sequence[tuple[RowRange, ...]]) -> int:
    return sum(part.rows for ranges in chunk for part in ranges)


def _complete(work: Folder, counts: Sequence[tuple[int, int]]) -> WorkPlan:
    plan = WorkPlan(records=sum(r for _, r in counts), chunks=tuple(pieces for pieces, _ in counts))
    plan.write(work)
    return plan


def _write_chunk(work: Folder, number: int, chunk: Sequence[tuple[RowRange, ...]]) -> None:
    rows = [
        {"records": sum(part.rows for part in ranges), "ranges": _ranges_json().dump_json(ranges).decode()}
        for ranges in chunk
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_PLANNED), sink, compression="zstd")
    work.write_bytes(sink.getvalue().to_pybytes(), "plan", _chunk_name(number))


def _chunk_name(number: int) -> str:
    return f"chunk-{number:06d}.parquet"


@lru_cache(1)
def _ranges_json() -> TypeAdapter[tuple[RowRange, ...]]:
    return TypeAdapter(tuple[RowRange, ...])
