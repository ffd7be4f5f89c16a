"""Which rows and images are left out, on ledgers written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crem.config import load_config
from pipelines.corpus import first_of_ids
from pipelines.corpus.curation import CHOSEN
from pipelines.corpus.decisions import GroupDecisions
from pipelines.corpus.ledger import PieceLedger, staged_pieces
from pipelines.corpus.resolve import resolve
from pipelines.corpus.work_plan import GROUP_PIECES, WorkPlan
from pipelines.duplicates.decision_tables import DECISIONS, duplicates_file, filtered_file, write_table
from pipelines.tables import ray_tasks
from pipelines.tables.storage import Folder

CONFIG = load_config("micro", ['prepare.exact_duplicates="off"']).prepare


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


def decided(
    work: Folder, ledgers: list[PieceLedger], chosen: dict[str, list[dict[str, Any]]] | None = None
) -> list[GroupDecisions]:
    """The decisions on each group.

    Args:
        chosen: rows to leave out by choice, by the name of their file: each piece is a part of its own here.
    """
    plan = WorkPlan(records=sum(len(one.row_ids) for one in ledgers), chunks=(len(ledgers),))
    for one in ledgers:
        one.write(work)
    for name, rows in (chosen or {}).items():
        write_table([{"cluster": None, **row} for row in rows], DECISIONS, work.child(CHOSEN), name)
    resolve(work, plan, CONFIG)
    assert GroupDecisions.are_made(work, plan, "images")
    return [GroupDecisions.read(work, group) for group in range(plan.groups)]


LEDGERS = [
    ledger(0, [1, 2], [10, 11], [(0, 10), (1, 11)]),
    ledger(1, [], [], []),
    ledger(2, [2, 3, 3], [12, 11, 13], [(0, 12), (1, 11), (2, 13)]),  # 12 and 13 belong only to repeated rows
    ledger(3, [4], [12], [(0, 12)]),
]


def of(decisions: GroupDecisions) -> tuple[list[list[bool]], list[list[bool]]]:
    return [decisions.keep_rows(x).tolist() for x in LEDGERS], [decisions.keep_images(x).tolist() for x in LEDGERS]


def test_the_first_row_of_an_id_and_one_copy_of_each_wanted_image_are_kept(tmp_path: Path) -> None:
    (decisions,) = decided(Folder.at(tmp_path), LEDGERS)
    rows, images = of(decisions)
    assert rows == [[True, True], [], [False, True, False], [True]]
    # image 12 is named by a kept row of the last piece only, which therefore holds it
    assert images == [[True, True], [], [False, False, False], [True]]
    assert decisions.rows.to_pylist() == [
        {"piece": 2, "place": place, "stage": "ids", "reason": "duplicate_id", "detail": None} for place in (0, 2)
    ]


def test_rows_left_out_by_choice_take_their_images_along(tmp_path: Path) -> None:
    near = {"id": 2, "stage": "duplicates", "reason": "near_duplicate", "detail": "of 7"}
    language = {"id": 4, "stage": "language", "reason": "other_language", "detail": "of 8"}
    chosen = {duplicates_file(0, 0): [near], filtered_file(0): [language]}
    (decisions,) = decided(Folder.at(tmp_path), LEDGERS, chosen)
    rows, images = of(decisions)
    assert rows == [[True, False], [], [False, True, False], [False]]
    assert images == [[True, False], [], [False, True, False], [False]], "image 11 is now held by the piece of row 3"
    assert [tuple(row.values()) for row in decisions.rows.to_pylist()] == [
        (0, 1, "duplicates", "near_duplicate", "of 7"),
        (2, 0, "ids", "duplicate_id", None),
        (2, 2, "ids", "duplicate_id", None),
        (3, 0, "language", "other_language", "of 8"),
    ]


def test_ledgers_are_read_as_they_were_written(tmp_path: Path) -> None:
    work = Folder.at(tmp_path)
    plan = WorkPlan(records=6, chunks=(GROUP_PIECES + 1,))
    assert staged_pieces(work, plan).tolist() == []
    for one in (*LEDGERS, ledger(GROUP_PIECES, [5], [], [])):
        one.write(work)
        read = PieceLedger.read(work, one.piece)
        for name, value in vars(one).items():
            assert np.array_equal(getattr(read, name), value), name
    assert staged_pieces(work, plan).tolist() == [0, 1, 2, 3, GROUP_PIECES]


@pytest.mark.ray
def test_groups_partition_the_decisions(tmp_path: Path, local_ray: None) -> None:
    pieces = GROUP_PIECES + 3
    ledgers = [ledger(i, [i % 100], [i % 50], [(0, i % 50)]) for i in range(pieces)]
    groups = decided(Folder.at(tmp_path), ledgers)
    assert [g.rows.num_rows for g in groups] == [GROUP_PIECES - 100, 3]
    assert [g.images.num_rows for g in groups] == [GROUP_PIECES - 50, 3]
    assert groups[1].rows["piece"].to_pylist() == [GROUP_PIECES, GROUP_PIECES + 1, GROUP_PIECES + 2]


@pytest.mark.ray
def test_the_shuffle_decides_the_same(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    random, pieces = np.random.default_rng(5), GROUP_PIECES + 40
    ledgers, chosen = [], {}
    for piece in range(pieces):
        images = random.choice(300, 6, replace=False).tolist()
        rows = random.integers(-400, 400, 5).tolist()
        refs = [(row, images[int(random.integers(6))]) for row in range(5)]
        ledgers.append(ledger(piece, rows, images, refs))
        if piece % 7 == 0:
            reason = {"stage": "language", "reason": "other_language", "detail": f"of {rows[0]}"}
            chosen[filtered_file(piece)] = [{"id": rows[0], **reason}]
    here = decided(Folder.at(tmp_path / "here"), ledgers, chosen)
    monkeypatch.setattr(first_of_ids, "_HERE", 0)
    monkeypatch.setattr(ray_tasks, "_IDS_PER_CPU", 200)
    shuffled = decided(Folder.at(tmp_path / "shuffled"), ledgers, chosen)
    assert len(here) == 2 and "language" in here[0].rows["stage"].to_pylist()
    for one, other in zip(here, shuffled, strict=True):
        assert one.rows.num_rows > 50 and one.images.num_rows > 50
        assert other.rows.equals(one.rows) and other.images.equals(one.images)
