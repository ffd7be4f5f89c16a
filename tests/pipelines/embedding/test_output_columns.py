"""The caller's own keys and columns come back as they went in."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.config import load_config
from crem.errors import ConfigError
from pipelines.embedding.embed import embed
from pipelines.embedding.output_columns import typed
from tests.pipelines.conftest import part_of, table, write_rows


def made(rows: list[dict[str, Any]], folder: Path, model: str, *settings: str) -> tuple[list[dict[str, Any]], Any]:
    source = write_rows(folder / ("items.jsonl" if rows[0].get("id") == 2**63 else "items.parquet"), rows)
    counts = embed(model, str(source), str(folder / "out"), load_config("micro", list(settings)))
    return table(folder / "out"), counts


@pytest.mark.ray
@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        ([str(uuid.UUID(int=i)) for i in range(4)], pa.string()),
        ([2**63 + i for i in range(4)], pa.uint64()),
        ([-3, 0, 7, 2**62], pa.int64()),
    ],
)
def test_ids_keep_their_type(
    ids: list[Any], kind: pa.DataType, tmp_path: Path, tiny_model_dir: str, local_ray: None
) -> None:
    rows = [{"id": i, "text": f"item {n}", "price": n / 2, "tags": ["a", str(n)]} for n, i in enumerate(ids)]
    found, counts = made(rows, tmp_path, tiny_model_dir, "embed.keep=[price, tags]")
    assert [(row["id"], row["price"], row["tags"]) for row in found] == [
        (row["id"], row["price"], row["tags"]) for row in rows
    ]
    schema = pq.read_schema(part_of(tmp_path / "out", 0))
    assert schema.field("id").type == kind and schema.field("price").type == pa.float64()
    assert counts.repeated_ids == 0


@pytest.mark.ray
def test_several_columns_are_one_id(tmp_path: Path, tiny_model_dir: str) -> None:
    rows = [{"shop": "a", "sku": n % 2, "text": f"t{n}", "price": n} for n in range(4)] + [{"text": "no id"}]
    found, counts = made(rows, tmp_path, tiny_model_dir, "embed.id=[shop, sku]", "embed.keep=[price]")
    assert [row["id"] for row in found[:4]] == [{"shop": "a", "sku": n % 2} for n in range(4)]
    assert found[4]["id"] is None and found[4]["error"] is None
    assert (counts.repeated_ids, counts.embedded, counts.rows_out) == (2, 5, 5)
    with pytest.raises(ConfigError, match=r"embed\.id names 'Sku'.*did you mean 'sku'"):
        made(rows, tmp_path / "b", tiny_model_dir, "embed.id=[shop, Sku]")


def test_repeated_ids_and_values_that_do_not_fit_are_counted(
    tmp_path: Path, tiny_model_dir: str, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{"id": i % 200, "text": f"item {i}", "price": i} for i in range(202)]
    source = tmp_path / "items.jsonl"
    write_rows(source, [*rows, {"id": 900, "text": "x", "price": "dear"}, {"id": "word", "text": "y", "price": 1}])
    counts = embed(tiny_model_dir, str(source), str(tmp_path / "out"), load_config("micro", ["embed.keep=[price]"]))
    assert (counts.rows_out, counts.embedded, counts.failed, counts.repeated_ids) == (204, 202, {"bad_value": 2}, 2)
    last = table(tmp_path / "out")[-2:]
    assert [row["error"] for row in last] == [
        "bad_value: column 'price' holds int64 in the first rows, and here 'dear'",
        "bad_value: column 'id' holds int64 in the first rows, and here 'word'",
    ]
    assert "2 rows have an id that an earlier row has" in caplog.text
    assert "column 'price' is not known" not in caplog.text


def test_a_column_to_keep_must_be_there(tmp_path: Path, tiny_model_dir: str) -> None:
    rows = [{"id": 1, "text": "a", "price": 1}]
    with pytest.raises(ConfigError, match=r"embed\.keep names 'Price'.*did you mean 'price'"):
        made(rows, tmp_path, tiny_model_dir, "embed.keep=[Price]")
    with pytest.raises(ConfigError, match=r"embed\.keep names 'text', which every output has"):
        made(rows, tmp_path, tiny_model_dir, "embed.keep=[text]")


def test_values_of_a_column() -> None:
    assert typed(["a", 1, None, {"b": 2}], pa.string(), "c")[0].to_pylist() == ["a", "1", None, '{"b": 2}']
    column, faults = typed([1, "2", 3.5, 2**70, None], pa.int64(), "c")
    assert column.to_pylist() == [1, None, None, None, None] and sorted(faults) == [1, 2, 3]
