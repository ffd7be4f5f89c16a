"""From ledgers to decisions: first by choice (duplicates, contamination, languages), then by id."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from crem.config import PrepareConfig
from pipelines.corpus.decisions import CHOSEN, GroupDecisions, resolve_here
from pipelines.corpus.ledger import PieceLedger, read_ledgers, staged_file
from pipelines.corpus.resolve_shuffle import resolve_by_shuffle
from pipelines.corpus.work_plan import WorkPlan
from pipelines.duplicates.decide import asked_for, decide
from pipelines.duplicates.parts import TablePart
from pipelines.tables.storage import Folder

__all__ = ["resolve"]

log = logging.getLogger(__name__)

_HERE_ROWS = 20_000_000
"""With more rows the driver does not hold their ids (24 bytes a row). Source: ours."""


def resolve(work: Folder, plan: WorkPlan, config: PrepareConfig) -> None:
    """Decide which rows and images are left out, unless that is done."""
    if GroupDecisions.are_made(work, plan):
        return
    rows = plan.records  # about as many; one record can hold several
    if asked_for(config):
        _choose(work, plan, config)
    if rows <= _HERE_ROWS:
        resolve_here(work, plan)
    else:
        resolve_by_shuffle(work, plan, rows=rows)


def _choose(work: Folder, plan: WorkPlan, config: PrepareConfig) -> None:
    """Write the rows to leave out by choice into the work folder."""
    work.remove(CHOSEN)
    rows: list[TablePart] = []
    images: list[TablePart] = []
    for group in range(plan.groups):
        for ledger in read_ledgers(work, plan.group(group)):
            rows += _parts(work, "rows", ledger, ledger.row_files)
            images += _parts(work, "images", ledger, ledger.image_files)
    if not rows:
        return
    found = decide(rows, images, config, work=work.child(CHOSEN))
    for reason, count in found.found.items():
        log.info("%d rows: %s; %d of them are left out", count, reason, found.left_out.get(reason, 0))


def _parts(work: Folder, table: str, ledger: PieceLedger, files: NDArray[np.int64]) -> list[TablePart]:
    names = tuple(staged_file(table, ledger.piece, ledger.attempt, number) for number in range(len(files)))
    return [TablePart(work, names, int(files.sum()))] if names else []
