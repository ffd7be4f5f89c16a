"""Where the staged pieces of a group are cut into final parts of bounded size.

The cuts depend on the ledgers and decisions alone, so the parts are the same for any number of workers, and after any
interruption. A task cuts a group and gives back the places of the cuts; the driver numbers the parts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.decisions import GroupDecisions
from pipelines.corpus.ledger import PieceLedger, read_ledgers
from pipelines.corpus.work_plan import WorkPlan
from pipelines.formats.unknown_columns import UnknownColumns
from pipelines.tables.storage import Folder

__all__ = ["GroupCuts", "PartTask", "cut_group", "part_tasks"]

_PART_ROWS = 100_000
_PART_BYTES = 128 * 2**20
"""A part of rows ends after so many staged rows or bytes, one of images after so many bytes. Source: ours."""


@dataclass(frozen=True)
class PartTask:
    """One part of ``rows``, with the rejections of its pieces, or of ``images``."""

    table: str
    number: int
    group: int
    start: tuple[int, int]
    stop: tuple[int, int]
    """The first piece and staged file of it that belong to the part, and the first that do not; of a part of rows, all
    files of its pieces."""


@dataclass(frozen=True)
class GroupCuts:
    """The parts of one group of pieces, and what its ledgers count."""

    group: int
    pieces: range
    rows: NDArray[np.int64]
    images: NDArray[np.int64]
    """[parts, 2] the ``stop`` of each part."""
    records: int
    rows_in: int
    unknown: UnknownColumns


def cut_group(group: int, *, work: Folder, plan: WorkPlan) -> GroupCuts:
    """Cut one group."""
    ledgers, decisions = read_ledgers(work, plan.group(group)), GroupDecisions.read(work, group)
    unknown = UnknownColumns()
    for ledger in ledgers:
        unknown.merge(UnknownColumns(Counter(json.loads(ledger.unknown_columns))))
    return GroupCuts(
        group,
        plan.group(group),
        np.array(list(_cuts_of_rows(ledgers)), np.int64).reshape(-1, 2),
        np.array(list(_cuts_of_images(ledgers, decisions)), np.int64).reshape(-1, 2),
        records=sum(ledger.records for ledger in ledgers),
        rows_in=sum(ledger.rows_in for ledger in ledgers),
        unknown=unknown,
    )


def part_tasks(cuts: Sequence[GroupCuts]) -> Iterator[PartTask]:
    """The parts of all groups, numbered through; ``cuts`` in the order of the groups."""
    rows = images = 0
    for of_group in cuts:
        for table, stops, first in (("images", of_group.images, images), ("rows", of_group.rows, rows)):
            start = (of_group.pieces.start, 0)
            for number, (piece, file) in enumerate(stops.tolist(), first):
                yield PartTask(table, number, of_group.group, start, (piece, file))
                start = (piece, file)
        rows, images = rows + len(of_group.rows), images + len(of_group.images)


def _cuts_of_rows(ledgers: Sequence[PieceLedger]) -> Iterator[tuple[int, int]]:
    rows = size = 0
    for ledger in ledgers:
        rows, size = rows + len(ledger.row_ids) + ledger.rejected, size + ledger.row_bytes
        if rows and (size >= _PART_BYTES or rows >= _PART_ROWS):
            yield ledger.piece + 1, 0
            rows = size = 0
    if rows:
        yield ledgers[-1].piece + 1, 0


def _cuts_of_images(ledgers: Sequence[PieceLedger], decisions: GroupDecisions) -> Iterator[tuple[int, int]]:
    size, any_kept = 0, False
    for ledger in ledgers:
        keep, start = decisions.keep_images(ledger), 0
        for file, images in enumerate(ledger.image_files.tolist()):
            kept = keep[start : start + images]
            size += int(ledger.image_bytes[start : start + images][kept].sum())
            any_kept |= bool(kept.any())
            if size >= _PART_BYTES:
                yield ledger.piece, file + 1
                size, any_kept = 0, False
            start += images
    if any_kept:
        yield ledgers[-1].piece + 1, 0
