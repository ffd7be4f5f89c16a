"""Each file is read by its own format and its own classes, also beside others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crem.config import PrepareConfig
from pipelines.formats.detection import ColumnUse, Detection, Layout
from pipelines.formats.record_reader import RecordReader
from pipelines.formats.sampling import place_of
from pipelines.sources.records import RawRecord, SourceRow
from tests.pipelines.conftest import write_rows
from tests.pipelines.formats.test_paths import RECORDS, read


def test_files_of_several_formats_in_one_folder(tmp_path: Path) -> None:
    for name in ("llava", "crem", "ms-swift"):
        write_rows(tmp_path / "c" / f"{name}.jsonl", [RECORDS[name]])
    own, llava, swift = read(tmp_path / "c")
    assert (own.target.text, llava.answer, swift.target.text) == ("t", "a", "q")


def test_compressed_files_of_several_formats_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORDS["llava"]).encode()))
    (tmp_path / "c" / "b.csv.gz").write_bytes(gzip.compress(b"query_text,target_text\nq,t\n"))
    assert [(row.answer, row.target.text) for row in read(tmp_path / "c")] == [("a", None), (None, "t")]
    assert place_of("x/a.jsonl.gz") != place_of("x/b.csv.gz")


def test_each_file_has_its_own_classes(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for file, names in (("a", ["cat", "dog"]), ("b", ["red", "blue"])):
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = pa.table({"image": ["1.png", "2.png"], "label": [0, 1]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / "c" / f"{file}.parquet")
    assert [row.target.text for row in read(tmp_path / "c")] == ["cat", "dog", "red", "blue"]


def test_a_file_that_was_not_sampled_is_read_as_those_beside_it_if_they_agree() -> None:
    def layout(name: str, column: str, *files: str) -> Layout:
        return Layout(name, (ColumnUse(column, "used", ""),), files)

    found = Detection(
        (layout("crem", "query_text", "x/1.jsonl", "y/1.jsonl"), layout("llava", "conversations", "y/2.jsonl")),
        PrepareConfig(),
        "prepare",
    )
    reader = RecordReader(found, "s")

    def row(file: str, record: RawRecord) -> str | None:
        (only,) = reader.rows(SourceRow("k", dict(record), "", file))
        return only.answer or only.target.text

    both = {**RECORDS["crem"], "conversations": RECORDS["llava"]["conversations"]}
    assert [row(file, both) for file in ("x/3.jsonl", "y/2.jsonl")] == ["t", "a"]
    assert [row("y/3.jsonl", RECORDS[name]) for name in ("crem", "llava")] == ["t", "a"]


def test_a_column_is_said_to_be_unknown_only_to_the_formats_whose_files_have_it(tmp_path: Path) -> None:
    layouts = (
        Layout("crem", (ColumnUse("mood", "unknown", ""),), ("a.jsonl",)),
        Layout("llava", (ColumnUse("conversations", "used", ""),), ("b.jsonl",)),
    )
    found = Detection(layouts, PrepareConfig(), "prepare")
    assert found.warnings() == ["column 'mood' is not known to crem and is not read"]
