"""Reading chosen rows by the indexes gives what reading everything gives."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from crem.config import load_config
from crem.errors import ConfigError
from pipelines.tables.chosen_rows import content_of
from pipelines.tables.image_index import ImageIndex
from pipelines.tables.prepared import index_images, index_rows, load_rows, read_rows
from pipelines.tables.row_index import RowIndex
from tests.pipelines.tables.written import write_tables

CONFIG = load_config("micro", ["train.global_batch=32"])


@pytest.fixture
def prepared(tmp_path: Path) -> str:
    return write_tables(tmp_path / "prepared")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("split", ["train", "test", ("train", "validation")])
def test_chosen_rows_are_the_same_as_when_all_are_read(split: str, old: bool, tmp_path: Path) -> None:
    prepared = write_tables(tmp_path / "prepared", old=old)
    oracle, index = read_rows(prepared, split_prefix=split), index_rows(prepared, split_prefix=split)
    table = oracle.table
    assert index.ids.tolist() == table["id"].to_pylist() == sorted(index.ids.tolist())
    assert index.paired.tolist() == table["target"].is_valid().to_pylist()
    assert index.answered.tolist() == table["answer"].is_valid().to_pylist()
    for name in ("split", "source", "task"):
        labels = getattr(index, name)
        assert [labels.names[code] for code in labels.codes] == table[name].to_pylist()
    draw = np.random.default_rng(0)
    numbers = draw.integers(0, len(index), 70)  # some rows twice
    z = draw.random(70) < 0.5
    loaded = load_rows(index.select(numbers), index_images(prepared))
    assert loaded.table.equals(table.take(pa.array(numbers)))
    got = loaded.examples(np.arange(70), z)
    wanted = oracle.examples(numbers, z, (1, 2))
    assert all(any(e.query.image_at for e in examples) is not old for examples in (got, wanted))
    for mine, theirs in zip(got, wanted, strict=True):
        assert vars(mine) | {"seed": theirs.seed} == vars(theirs)


def test_the_plan_is_that_of_the_rows_read_whole(prepared: str) -> None:
    """Tasks are numbered in the order in which the chosen rows have them: the order of a seed hangs on it."""
    table = read_rows(prepared, split_prefix="train").table
    index = index_rows(prepared, split_prefix=("train", "validation"))
    plan = index.select(index.split.starts_with("train")).plan(CONFIG)
    paired, answered = table["target"].is_valid().to_numpy(), table["answer"].is_valid().to_numpy()
    assert plan.retrieval.tolist() == np.flatnonzero(paired).tolist()
    assert plan.heterogeneous.tolist() == np.flatnonzero(~paired & answered).tolist()
    assert plan.tasks.tolist() == table["task"].combine_chunks().dictionary_encode().indices.to_pylist()


def remake(folder: Path, table: str, change: str) -> None:
    path = folder / table / "part-000001.parquet"
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    elif change == "short":
        path.write_bytes(content[: len(content) // 2])
    elif change == "zeros":
        middle = len(content) // 4
        path.write_bytes(content[:middle] + bytes(middle) + content[2 * middle :])
    elif change == "fewer":
        pq.write_table(pq.read_table(path).slice(0, 1), path)


@pytest.mark.parametrize("change", ["missing", "short", "zeros", "fewer"])
@pytest.mark.parametrize("table", ["rows", "images"])
def test_a_part_that_goes_bad_after_the_start_is_named(table: str, change: str, prepared: str) -> None:
    index, images = index_rows(prepared, split_prefix="train"), index_images(prepared)
    remake(Path(prepared), table, change)
    with pytest.raises(
        ConfigError, match=rf"{table}/part-000001\.parquet is (missing|damaged).*; run crem prepare again"
    ):
        load_rows(index, images)


@pytest.mark.parametrize("table", ["rows", "images"])
def test_a_part_that_is_bad_at_the_start_is_named(table: str, prepared: str) -> None:
    remake(Path(prepared), table, "short")
    with pytest.raises(ConfigError, match=rf"{table}/part-000001\.parquet is damaged.*; run crem prepare again"):
        (index_rows if table == "rows" else index_images)(
            prepared, **({"split_prefix": "t"} if table == "rows" else {})
        )


def test_an_image_that_no_part_has_is_named(prepared: str) -> None:
    index, images = index_rows(prepared, split_prefix="train"), index_images(prepared)
    first = content_of(index)["query"].combine_chunks().flatten()[2].drop_null()
    wanted = next(i for row in first.to_pylist() for i in row)
    without = images.ids != wanted
    fewer = ImageIndex(
        images.images, images.parts, images.ids[without], images.part[without], images.start[without],
        images.length[without],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=rf"names the image {wanted}, which is in no part of .*images"):
        load_rows(index, fewer)


def test_no_rows_of_a_split(prepared: str) -> None:
    for read in (read_rows, index_rows):
        with pytest.raises(ConfigError, match="has no rows of a split that starts with 'nope'"):
            read(prepared, split_prefix="nope")


def test_images_close_together_share_a_request(prepared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = index_images(prepared)
    requests: list[tuple[str, int, int]] = []
    plain = ImageIndex._request

    def counted(self: ImageIndex, name: str, start: int, end: int, held: list[tuple[int, int, int]]) -> object:
        requests.append((name, start, end))
        return plain(self, name, start, end, held)

    monkeypatch.setattr(ImageIndex, "_request", counted)
    twice = np.concatenate([images.ids, images.ids])
    assert len(images.fetch(twice)) == len(images.ids) == 60
    assert len(requests) == 3, "one for each of the small parts"
    requests.clear()
    monkeypatch.setattr("pipelines.tables.image_index._GAP_BYTES", 0)
    one = images.fetch(images.ids[:1])
    assert [end - start for _, start, end in requests] == [len(next(iter(one.values())))], "exactly its bytes"


def test_an_index_holds_few_bytes_a_row(prepared: str) -> None:
    index, images = index_rows(prepared, split_prefix=""), index_images(prepared)
    assert sum(column.nbytes for column in vars_of(index)) == len(index) * 30
    assert sum(a.nbytes for a in (images.ids, images.part, images.start, images.length)) == len(images.ids) * 24


def vars_of(index: RowIndex) -> list[np.ndarray]:  # type: ignore[type-arg]
    labels = [index.split.codes, index.source.codes, index.task.codes]
    return [index.ids, index.part, index.row, index.paired, index.answered, *labels]


@pytest.mark.slow
def test_storage_that_is_away_is_waited_for(s3_server: Any, s3_env: Any, tmp_path: Path) -> None:
    local = write_tables(tmp_path / "prepared")
    s3fs.S3FileSystem().put(local, f"{s3_server.bucket}/chosen", recursive=True)
    prepared = f"s3://{s3_server.bucket}/chosen"
    index, images = index_rows(prepared, split_prefix="train"), index_images(prepared)
    oracle = read_rows(local, split_prefix="train")
    s3_server.kill()
    back, began = threading.Timer(30, s3_server.start), time.monotonic()
    back.start()
    try:
        loaded = load_rows(index, images)
    finally:
        back.join()
    assert time.monotonic() - began > 25, "it had to wait"
    assert loaded.table.equals(oracle.table) and loaded.images == oracle.images
