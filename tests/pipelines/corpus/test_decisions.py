"""Which rows and images are left out, on ledgers written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.decisions import CHOSEN, LEFT_OUT_IDS, GroupDecisions, decide, resolve_here
from pipelines.corpus.ledger import PieceLedger
from pipelines.corpus.resolve_shuffle import resolve_by_shuffle
from pipelines.corpus.work_plan import GROUP_PIECES, WorkPlan
from pipelines.tables.storage import Folder


def ledger(piece: int, rows: list[int], images: list[int], refs: list[tuple[int, int]]) -> PieceLedger:
    columns = rows, images, [1] * len(images), [0] * len(images), [r for r, _ in refs], [i for _, i in refs]
    arrays = (np.array(values, np.int64) for values in columns)
    files = (
        np.array([len(rows)]),
        1,
        np.array([len(images)]),
        np.array([], np.int64),
        "{}",
        np.zeros(len(images), np.int64),
    )
    return PieceLedger(piece, "a", len(rows), len(rows), 0, *arrays, *files)


LEDGERS = [
    ledger(0, [1, 2], [10, 11], [(0, 10), (1, 11)]),
    ledger(1, [], [], []),
    ledger(2, [2, 3, 3], [12, 11, 13], [(0, 12), (1, 11), (2, 13)]),  # 12 and 13 belong only to repeated rows
    ledger(3, [4], [12], [(0, 12)]),
]
PLAN = WorkPlan(records=6, chunks=(4,))


def of(decisions: GroupDecisions) -> tuple[list[list[bool]], list[list[bool]]]:
    return [decisions.keep_rows(x).tolist() for x in LEDGERS], [decisions.keep_images(x).tolist() for x in LEDGERS]


def test_the_first_row_of_an_id_and_one_copy_of_each_wanted_image_are_kept() -> None:
    (decisions,) = decide(LEDGERS, LEFT_OUT_IDS.empty_table(), PLAN)
    rows, images = of(decisions)
    assert rows == [[True, True], [], [False, True, False], [True]]
    # image 12 is named by a kept row of the last piece only, which therefore holds it
    assert images == [[True, True], [], [False, False, False], [True]]
    assert decisions.rows.to_pylist() == [
        {"piece": 2, "row": row, "stage": "ids", "reason": "duplicate_id", "detail": None} for row in (0, 2)
    ]


def test_rows_left_out_by_choice_take_their_images_along() -> None:
    chosen = [
        {"id": 2, "stage": "duplicates", "reason": "near_duplicate", "detail": "of 7"},
        {"id": 9, "stage": "language", "reason": "language", "detail": "no such row"},
    ]
    (decisions,) = decide(LEDGERS, pa.Table.from_pylist(chosen, schema=LEFT_OUT_IDS), PLAN)
    rows, images = of(decisions)
    assert rows == [[True, False], [], [False, True, False], [True]]
    assert images == [[True, False], [], [False, True, False], [True]], "image 11 is now held by the piece of row 3"
    assert [tuple(row.values()) for row in decisions.rows.to_pylist()] == [
        (0, 1, "duplicates", "near_duplicate", "of 7"),
        (2, 0, "ids", "duplicate_id", None),
        (2, 2, "ids", "duplicate_id", None),
    ]


def test_decisions_and_ledgers_are_read_as_they_were_written(tmp_path: object) -> None:
    work = Folder.at(str(tmp_path))
    (decisions,) = decide(LEDGERS, LEFT_OUT_IDS.empty_table(), PLAN)
    decisions.write(work, 0)
    assert GroupDecisions.are_made(work, PLAN)
    assert of(GroupDecisions.read(work, 0)) == of(decisions)
    for one in LEDGERS:
        one.write(work)
        read = PieceLedger.read(work, one.piece)
        for name, value in vars(one).items():
            assert np.array_equal(getattr(read, name), value), name


def test_groups_partition_the_decisions() -> None:
    pieces = GROUP_PIECES + 3
    ledgers = [ledger(i, [i % 100], [i % 50], [(0, i % 50)]) for i in range(pieces)]
    groups = list(decide(ledgers, LEFT_OUT_IDS.empty_table(), WorkPlan(records=pieces, chunks=(pieces,))))
    assert [g.rows.num_rows for g in groups] == [GROUP_PIECES - 100, 3]
    assert [g.images.num_rows for g in groups] == [GROUP_PIECES - 50, 3]
    assert groups[1].rows["piece"].to_pylist() == [GROUP_PIECES, GROUP_PIECES + 1, GROUP_PIECES + 2]


@pytest.mark.ray
def test_the_shuffle_decides_the_same(tmp_path: Path, local_ray: None) -> None:
    random, pieces = np.random.default_rng(5), GROUP_PIECES + 40
    ledgers = []
    for piece in range(pieces):
        images = random.choice(300, 6, replace=False).tolist()
        rows = random.integers(-400, 400, 5).tolist()
        refs = [(row, images[int(random.integers(6))]) for row in range(5)]
        ledgers.append(ledger(piece, rows, images, refs))
    plan = WorkPlan(records=5 * pieces, chunks=(pieces,))
    chosen = [{"id": i, "stage": "language", "reason": "language", "detail": f"of {i}"} for i in range(0, 400, 7)]
    works = [Folder.at(tmp_path / name) for name in ("here", "shuffled")]
    for work in works:
        for one in ledgers:
            one.write(work)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(chosen, schema=LEFT_OUT_IDS), sink)
        work.write_bytes(sink.getvalue().to_pybytes(), CHOSEN, "a.parquet")
    resolve_here(works[0], plan)
    resolve_by_shuffle(works[1], plan, rows=5 * pieces, ids_per_bucket=300)
    for group in range(2):
        here, shuffled = (GroupDecisions.read(work, group) for work in works)
        assert here.rows.num_rows > 50 and here.images.num_rows > 50
        assert shuffled.rows.equals(here.rows) and shuffled.images.equals(here.images)
