"""Rows that are left out by choice: duplicates, contamination, other languages (``pipelines.duplicates``).

After repeated ids are known, and before the decisions on rows. What is chosen stands in ``CHOSEN`` of the work folder,
a file or two for each *part*: neighbouring pieces that are put together to one task. The driver knows how many rows a
part has; a worker finds its files. The largest clusters are published beside the manifest, for the card.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from crem.config import PrepareConfig
from pipelines.corpus.decisions import LEFT_OUT_IDS, keep_of_pieces
from pipelines.corpus.ledger import read_ledgers, staged_file
from pipelines.corpus.publish import clusters_file
from pipelines.corpus.work_plan import WorkPlan
from pipelines.duplicates.decide import asked_for, decide, needs_libraries
from pipelines.duplicates.decision_tables import read_clusters, read_decisions
from pipelines.duplicates.parts import FoundFiles, TablePart
from pipelines.tables import ray_tasks
from pipelines.tables.manifest import read_manifest
from pipelines.tables.storage import Folder

__all__ = ["CHOSEN", "chosen_rows", "curate", "identity", "publish_clusters"]

log = logging.getLogger(__name__)

CHOSEN = "left_out"
"""Folder, in the work folder, of the rows to leave out by choice and of clusters."""
_PARTS = 4096
"""Parts at most that the staged pieces are put together to: each is one task, and a number in the driver."""
_PART_ROWS = 4096
"""Rows of a part at least: the keys of fewer are made faster than a task starts."""


def identity(config: PrepareConfig) -> JsonValue:
    """What decides beside the settings: the evaluation sets, and the versions of the libraries."""
    held: list[JsonValue] = [str(read_manifest(Folder.at(uri)).content_id) for uri in config.contamination]
    versions: list[JsonValue] = [f"{name} {metadata.version(name)}" for name in needs_libraries(config)]
    return held + versions


def curate(work: Folder, plan: WorkPlan, config: PrepareConfig) -> None:
    """Decide on the staged rows of a plan, and say what was found."""
    if not asked_for(config):
        return
    rows, images = _staged_parts(work, plan)
    decisions = decide(rows, images, config, work=work.child(CHOSEN))
    for name, count in decisions.found.items():
        left_out = decisions.left_out.get(name, 0)
        log.info("%s: %d rows, of which %d are left out", name.replace("/", ": "), count, left_out)
    if decisions.clusters:
        log.info("%d clusters of duplicate rows", decisions.clusters)


def publish_clusters(target: Folder, work: Folder, version: str) -> None:
    """Write the largest clusters beside the manifest; nothing where there are none."""
    clusters = read_clusters(work.child(CHOSEN))
    if clusters.num_rows:
        sink = pa.BufferOutputStream()
        pq.write_table(clusters, sink, compression="zstd")
        target.write_bytes(sink.getvalue().to_pybytes(), clusters_file(version))


def chosen_rows(work: Folder, plan: WorkPlan, group: int) -> pa.Table:
    """``LEFT_OUT_IDS`` of the rows that are left out of a group of pieces, among them some of neighbouring groups."""
    together, pieces = _together(plan), plan.group(group)
    parts = range(pieces.start // together, (pieces.stop - 1) // together + 1)
    return read_decisions(work.child(CHOSEN), parts).select(LEFT_OUT_IDS.names)


@dataclass(frozen=True)
class _PartSizes:
    number: int
    rows: int
    images: list[tuple[range, int]]
    """Pieces and images of the parts of images among its pieces, which are smaller: images take longer."""


def _staged_parts(work: Folder, plan: WorkPlan) -> tuple[list[TablePart], list[TablePart]]:
    """The staged rows and images, several pieces a part; rows count where they are the first of their id."""
    count = partial(_part_sizes, work=work, plan=plan)
    parts = range(-(-plan.pieces // _together(plan)))
    sizes: Iterator[_PartSizes] = map(count, parts) if plan.groups == 1 else ray_tasks.stream(count, parts)
    rows, images = [], []
    for part in sorted(sizes, key=lambda part: part.number):
        find = partial(_find, _pieces(part.number, plan), "rows", work=work)
        rows.append(TablePart(work, (), part.rows, find=find))
        for pieces, number in part.images:
            images.append(TablePart(work, (), number, find=partial(_find, pieces, "images", work=work)))
    return rows, images


def _step(plan: WorkPlan) -> int:
    """Pieces of a part of images."""
    return -(-plan.pieces // _PARTS)


def _together(plan: WorkPlan) -> int:
    """Pieces of a part of rows."""
    return _step(plan) * max(1, _PART_ROWS * plan.pieces // plan.records // _step(plan))


def _pieces(part: int, plan: WorkPlan) -> range:
    together = _together(plan)
    return range(part * together, min(plan.pieces, (part + 1) * together))


def _part_sizes(part: int, *, work: Folder, plan: WorkPlan) -> _PartSizes:
    pieces, step = _pieces(part, plan), _step(plan)
    ledgers = read_ledgers(work, pieces)
    images = [
        (pieces[at : at + step], sum(len(ledger.image_ids) for ledger in ledgers[at : at + step]))
        for at in range(0, len(pieces), step)
    ]
    rows = sum(len(ledger.row_ids) for ledger in ledgers)
    return _PartSizes(part, rows, [(found, number) for found, number in images if number])


def _find(pieces: range, table: str, *, work: Folder) -> FoundFiles:
    """In a worker: the staged files of a part, and which of its rows count."""
    ledgers = read_ledgers(work, pieces)
    names = [
        staged_file(table, ledger.piece, ledger.attempt, number)
        for ledger in ledgers
        for number in range(len(ledger.row_files if table == "rows" else ledger.image_files))
    ]
    return FoundFiles(tuple(names), keep_of_pieces(work, ledgers) if table == "rows" else None)
