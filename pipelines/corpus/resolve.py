"""From ledgers to decisions, in the order that ``decisions`` describes; each step is done once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crem.config import PrepareConfig
from pipelines.corpus.curation import chosen_rows, curate
from pipelines.corpus.decisions import PLACES, GroupDecisions, left_out_rows, wanted_images
from pipelines.corpus.first_of_ids import IDS, drop_repeats
from pipelines.corpus.ledger import PieceLedger, read_ledgers
from pipelines.corpus.work_plan import WorkPlan, each_group
from pipelines.tables.storage import Folder

__all__ = ["resolve"]


def resolve(work: Folder, plan: WorkPlan, config: PrepareConfig) -> None:
    """Decide which rows and images are left out, unless that is done."""
    if GroupDecisions.are_made(work, plan, "images"):
        return
    scratch = work.child("repeats")
    if not GroupDecisions.are_made(work, plan, "repeats"):
        rows = plan.records  # about as many; one record can hold several
        read, write = partial(_row_ids, work=work, plan=plan), partial(_write_repeats, work=work)
        drop_repeats(plan, rows, read, write, scratch)
    if not GroupDecisions.are_made(work, plan, "rows"):
        curate(work, plan, config)
    images = sum(each_group(partial(_decide_rows, work=work, plan=plan), range(plan.groups)))
    read, write = partial(_wanted_ids, work=work, plan=plan), partial(_write_images, work=work, plan=plan)
    drop_repeats(plan, images, read, write, scratch)


def _row_ids(group: int, *, work: Folder, plan: WorkPlan) -> pa.Table:
    """``IDS`` of all rows of a group."""
    ledgers = read_ledgers(work, plan.group(group))
    return _ids((ledger.piece, ledger.row_ids, np.arange(len(ledger.row_ids))) for ledger in ledgers)


def _write_repeats(group: int, repeated: pa.Table, *, work: Folder) -> None:
    GroupDecisions.write_repeats(work, group, repeated.select(PLACES.names))


def _decide_rows(group: int, *, work: Folder, plan: WorkPlan) -> int:
    """Write the decisions on the rows of a group; how many images the kept ones name."""
    ledgers = read_ledgers(work, plan.group(group))
    rows = left_out_rows(ledgers, GroupDecisions.read_repeats(work, group), chosen_rows(work, plan, group))
    GroupDecisions.write_rows(work, group, rows)
    return sum(int(_wanted(ledger, rows).sum()) for ledger in ledgers)


def _wanted_ids(group: int, *, work: Folder, plan: WorkPlan) -> pa.Table:
    """``IDS`` of the images of a group to which its kept rows refer."""
    rows = GroupDecisions.read_rows(work, group)
    wanted = ((ledger, np.flatnonzero(_wanted(ledger, rows))) for ledger in read_ledgers(work, plan.group(group)))
    return _ids((ledger.piece, ledger.image_ids[places], places) for ledger, places in wanted)


def _wanted(ledger: PieceLedger, rows: pa.Table) -> NDArray[np.bool_]:
    return wanted_images(ledger, GroupDecisions.kept(rows, ledger.piece, len(ledger.row_ids)))


def _ids(found: Iterable[tuple[int, NDArray[np.int64], NDArray[np.int64]]]) -> pa.Table:
    columns: list[list[NDArray[Any]]] = [[np.empty(0, field.type.to_pandas_dtype())] for field in IDS]
    for piece, ids, places in found:
        values: tuple[NDArray[Any], ...] = (ids, np.full(len(ids), piece), places.astype(np.int32))
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return pa.table([np.concatenate(column) for column in columns], schema=IDS)


def _write_images(group: int, repeated: pa.Table, *, work: Folder, plan: WorkPlan) -> None:
    """What is not wanted, and what an earlier piece has."""
    rows = GroupDecisions.read_rows(work, group)
    pieces, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for ledger in read_ledgers(work, plan.group(group)):
        wanted = _wanted(ledger, rows)
        found = np.flatnonzero(~(wanted & GroupDecisions.kept(repeated, ledger.piece, len(wanted))))
        pieces.append(np.full(len(found), ledger.piece))
        places.append(found)
    columns = [np.concatenate(pieces), np.concatenate(places).astype(np.int32)]
    GroupDecisions.write_images(work, group, pa.table(columns, schema=PLACES))
