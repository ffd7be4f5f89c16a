"""From ledgers to decisions: first by choice (duplicates, contamination, languages), then by id."""

from __future__ import annotations

from crem.config import PrepareConfig
from pipelines.corpus.curation import curate
from pipelines.corpus.decisions import GroupDecisions, resolve_here
from pipelines.corpus.resolve_shuffle import resolve_by_shuffle
from pipelines.corpus.work_plan import WorkPlan
from pipelines.tables.storage import Folder

__all__ = ["resolve"]

_HERE_ROWS = 20_000_000
"""With more rows the driver does not hold their ids (24 bytes a row). Source: ours."""


def resolve(work: Folder, plan: WorkPlan, config: PrepareConfig) -> None:
    """Decide which rows and images are left out, unless that is done."""
    if GroupDecisions.are_made(work, plan):
        return
    rows = plan.records  # about as many; one record can hold several
    curate(work, plan, config)
    if rows <= _HERE_ROWS:
        resolve_here(work, plan)
    else:
        resolve_by_shuffle(work, plan, rows=rows)
