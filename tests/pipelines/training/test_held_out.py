"""Rows for validation, the rows of a failed step, and the table of the data: pure functions over tables made here."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.config import RunConfig, load_config
from crem.errors import DivergenceError
from crem.model.build import build_model
from pipelines.tables import schema
from pipelines.tables.chosen_rows import content_of
from pipelines.tables.prepared import PreparedRows
from pipelines.tables.row_index import RowIndex, index_of, scan_part
from pipelines.tables.storage import Folder
from pipelines.training.failed_step import save_failed_step
from pipelines.training.held_out import DataMixRow, data_mix, hash_of, split_rows, training_texts, validation_batches
from tests.conftest import TEXTS, TINY

Rows = Callable[..., RowIndex]


@pytest.fixture
def rows_of(tmp_path: Path) -> Rows:
    """Writes ``write_rows``, and indexes them."""
    return partial(write_rows, tmp_path)


def write_rows(folder: Path, *splits: str) -> RowIndex:
    """A row for each name: every third one has no target, every other one an answer; ids are in order of the source."""

    def side(text: str) -> dict[str, object]:
        return {"text": text, "instruction": None, "images": [], "image_at": []}

    rows = [
        {
            "id": i,
            "source": "first" if i < len(splits) // 2 else "second",
            "key": str(i),
            "task": "t" if i % 3 else "caption",
            "split": split,
            "query": side(f"query {i} " + "long " * 40),
            "target": side(f"target {i}") if i % 3 else None,
            "negatives": None,
            "question": "what?" if i % 2 == 0 or i % 3 == 0 else None,
            "answer": f"answer {i}" if i % 2 == 0 or i % 3 == 0 else None,
        }
        for i, split in enumerate(splits)
    ]
    name = f"{uuid.uuid4().hex}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.ROWS), folder / name, row_group_size=7)
    stored = Folder.at(folder)
    return index_of(stored, [name], [scan_part(stored, name, "")])


def config(*overrides: str) -> RunConfig:
    return load_config("micro", [*TINY, "train.global_batch=16", "train.workers=2", *overrides])


def ids(rows: RowIndex | None) -> list[int]:
    return [] if rows is None else rows.ids.tolist()


def test_training_rows_are_held_out_by_the_hash_of_their_id(rows_of: Rows) -> None:
    rows = rows_of(*["train"] * 400)
    training, held_out = split_rows(rows, config("train.validation_rows=20"))
    by_hash = [int(i) for i in np.argsort(hash_of(np.arange(400)))]
    assert sorted(ids(held_out)) == sorted(by_hash[:20])
    assert sorted(ids(training) + ids(held_out)) == list(range(400))
    other = config("train.validation_rows=20", "train.seed=9", "train.workers=4", "train.global_batch=64")
    assert ids(split_rows(rows, other)[1]) == ids(held_out), "no other setting changes which"
    assert Counter("first" if i < 200 else "second" for i in ids(held_out)).most_common()[-1][1] >= 5, "of every source"
    planned = np.concatenate([training.plan(config()).step(s).rows for s in range(80)])
    assert set(np.array(ids(training))[planned]) == set(ids(training)), "all of the rest is trained on, and only that"


def test_at_most_a_tenth_is_held_out(rows_of: Rows) -> None:
    assert len(ids(split_rows(rows_of(*["train"] * 400), config())[1])) == 40


def test_a_split_of_its_own_leaves_the_training_rows_alone(rows_of: Rows) -> None:
    rows = rows_of(*["train", "train_b", "validation", "validation_b"] * 25)
    training, held_out = split_rows(rows, config("train.validation_rows=30"))
    assert len(ids(training)) == 50 and {i % 4 for i in ids(training)} == {0, 1}
    assert len(ids(held_out)) == 30 and {i % 4 for i in ids(held_out)} == {2, 3}
    texts = set(training_texts(rows))
    assert "target 1" in texts and "target 2" not in texts


@pytest.mark.parametrize("off", ["train.validation_rows=0", "train.validate_every=0"])
def test_without_validation_nothing_is_held_out(off: str, rows_of: Rows) -> None:
    training, held_out = split_rows(rows_of(*["train"] * 40), config(off))
    assert held_out is None and len(ids(training)) == 40


def test_too_few_rows_are_no_validation(rows_of: Rows) -> None:
    training, held_out = split_rows(rows_of(*["train"] * 12), config())
    assert held_out is None and len(ids(training)) == 12


@pytest.mark.parametrize(("count", "ranks", "chunk_rows"), [(40, 2, 0), (37, 4, 2), (5, 4, 1), (9, 1, 4)])
def test_ranks_share_the_rows_in_equally_many_batches(count: int, ranks: int, chunk_rows: int, rows_of: Rows) -> None:
    c = config(f"train.chunk_rows={chunk_rows}", f"train.workers={ranks}")
    _, held_out = split_rows(rows_of(*["validation"] * count, *["train"] * 20), c)
    assert held_out is not None
    loaded = PreparedRows(content_of(held_out), {})
    _, collator = build_model(c.model, texts=TEXTS)
    shares = [list(validation_batches(loaded, c, collator, rank=r, ranks=ranks)) for r in range(ranks)]
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) > 0
    pairs = [(native, compressed) for share in shares for native, compressed in share]
    targets = sum(len(native.queries) for native, _ in pairs)
    assert targets == sum(t is not None for t in content_of(held_out)["target"].to_pylist())
    assert not any(native.z.any() for native, _ in pairs)
    answered = sum(a is not None for a in content_of(held_out)["answer"].to_pylist())
    assert sum(int(compressed.z.sum()) for _, compressed in pairs) == answered


def test_the_rows_of_a_failed_step(tmp_path: Path, rows_of: Rows) -> None:
    """By rank, as the plan gave them; the message names the file."""
    rows, c = rows_of(*["train"] * 60), config()
    error = DivergenceError("the loss of step 5 is nan", 5, 2, {"loss": float("nan"), "retrieval": 1.5})
    raised = save_failed_step(error, rows, c, Folder.at(tmp_path))
    assert str(raised).startswith("the loss of step 5 is nan") and f"{tmp_path}/failed_step.json" in str(raised)
    saved = json.loads((tmp_path / "failed_step.json").read_text())
    assert (saved["step"], saved["loss"], saved["retrieval"]) == (5, "nan", 1.5)
    for rank in (0, 1):
        share = rows.plan(c).step(5, rank=rank, ranks=2)
        saved_share = saved["ranks"][rank]
        assert saved_share["rank"] == rank and len(saved_share["rows"]) == 8
        assert [row["id"] for row in saved_share["rows"]] == rows.ids[share.rows].tolist()
        assert [row["z"] for row in saved_share["rows"]] == share.z.tolist()
        assert all(
            row["query"].startswith(f"query {row['id']} ") and len(row["query"]) == 80 for row in saved_share["rows"]
        )


def test_the_table_of_the_data(rows_of: Rows) -> None:
    training, held_out = rows_of(*["train"] * 12), rows_of(*["validation"] * 4)
    mix = data_mix(training, held_out)
    assert sum(m.rows for m in mix) == 12 and sum(m.held_out for m in mix) == 4
    assert mix[0] == DataMixRow("first", "t", rows=4, pairs=4, answers=2, held_out=1)
