"""Rows that are left out by choice: duplicates, contamination, other languages (``pipelines.duplicates``).

Between the staging and the resolution of ids. The decisions stand in ``CHOSEN`` of the work folder, where
``decisions`` reads them; the largest clusters are published beside the manifest, for the card.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import metadata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from crem.config import PrepareConfig
from pipelines.corpus.decisions import CHOSEN, first_of_each
from pipelines.corpus.ledger import PieceLedger, read_ledgers, staged_file
from pipelines.corpus.publish import clusters_file
from pipelines.corpus.work_plan import WorkPlan
from pipelines.duplicates.decide import asked_for, decide, needs_libraries
from pipelines.duplicates.decision_tables import read_clusters
from pipelines.duplicates.parts import TablePart
from pipelines.tables.manifest import read_manifest
from pipelines.tables.storage import Folder

__all__ = ["curate", "identity", "publish_clusters"]

log = logging.getLogger(__name__)

_PARTS = 4096
"""Parts at most that the staged pieces are put together to: each is one task, and a number in the driver."""
_IDS_HERE = 100_000_000
"""Records whose ids the driver holds, in 0.8 GB."""
_CLUSTERS = 1000
"""Clusters of each kind that are published, the largest first."""


def identity(config: PrepareConfig) -> JsonValue:
    """What decides beside the settings: the evaluation sets, and the versions of the libraries."""
    held: list[JsonValue] = [str(read_manifest(Folder.at(uri)).content_id) for uri in config.contamination]
    versions: list[JsonValue] = [f"{name} {metadata.version(name)}" for name in needs_libraries(config)]
    return held + versions


def curate(work: Folder, plan: WorkPlan, config: PrepareConfig) -> None:
    """Decide on the staged rows of a plan, and say what was found."""
    if not asked_for(config):
        return
    work.remove(CHOSEN)
    rows, images = _staged_parts(work, plan)
    decisions = decide(rows, images, config, work=work.child(CHOSEN))
    for name, count in decisions.found.items():
        left_out = decisions.left_out.get(name, 0)
        log.info("%s: %d rows, of which %d are left out", name.replace("/", ": "), count, left_out)
    if decisions.clusters:
        log.info("%d clusters of duplicate rows", decisions.clusters)


def publish_clusters(target: Folder, work: Folder, version: str) -> None:
    """Write the largest clusters beside the manifest; nothing where there are none."""
    clusters = read_clusters(work.child(CHOSEN), _CLUSTERS)
    if clusters.num_rows:
        sink = pa.BufferOutputStream()
        pq.write_table(clusters, sink, compression="zstd")
        target.write_bytes(sink.getvalue().to_pybytes(), clusters_file(version))


def _staged_parts(work: Folder, plan: WorkPlan) -> tuple[list[TablePart], list[TablePart]]:
    """The staged rows and images, several pieces a part; rows count where they are the first of their id.

    Of more than ``_IDS_HERE`` records all rows count: a row may then be the duplicate of one whose id is rejected.
    """
    together = -(-plan.pieces // _PARTS)
    rows: list[TablePart] = []
    images: list[TablePart] = []
    ids: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for start in range(0, plan.pieces, together):
        ledgers = read_ledgers(work, range(start, min(plan.pieces, start + together)))
        if plan.records <= _IDS_HERE:
            ids.append(np.concatenate([ledger.row_ids for ledger in ledgers]))
        rows.append(_part(work, "rows", ledgers, [ledger.row_files for ledger in ledgers]))
        images.append(_part(work, "images", ledgers, [ledger.image_files for ledger in ledgers]))
    images = [part for part in images if part.rows]
    if not ids:
        return rows, images
    first = np.split(first_of_each(np.concatenate(ids)), np.cumsum([len(of_part) for of_part in ids])[:-1])
    return [replace(part, keep=keep) for part, keep in zip(rows, first, strict=True)], images


def _part(work: Folder, table: str, ledgers: list[PieceLedger], files: list[np.ndarray]) -> TablePart:
    names = [
        staged_file(table, ledger.piece, ledger.attempt, number)
        for ledger, sizes in zip(ledgers, files, strict=True)
        for number in range(len(sizes))
    ]
    return TablePart(work, tuple(names), int(sum(sizes.sum() for sizes in files)))
