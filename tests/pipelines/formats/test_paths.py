"""The split of a record: one rule, whatever its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crem.config import PrepareConfig
from pipelines.formats.detection import detect_source
from pipelines.formats.paths import split_named, split_of, split_of_folder
from pipelines.formats.raw_rows import RawRow
from pipelines.formats.record_reader import RecordReader
from pipelines.sources import sources
from pipelines.tables.manifest import READ_SPLITS
from tests.pipelines.conftest import write_rows
from tests.pipelines.formats.reading import row_of

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MESSAGES = [{"role": "user", "content": "q"}]
RECORDS: dict[str, dict[str, Any]] = {
    "crem": {"query_text": "q", "target_text": "t"},
    "mmeb-train": {"qry": "q", "pos_text": "t"},
    "ms-swift": {"messages": MESSAGES, "positive_messages": [MESSAGES]},
    "messages": {"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]},
    "llava": {"conversations": TURNS},
    "imagefolder": {"file_name": "a.jpg", "text": "t"},
    "table": {"image": "a.jpg", "caption": "t"},
    "webdataset": {"__key__": "1", "jpg": b"1", "json": {"caption": "t"}},
}


def read(place: Path | str) -> list[RawRow]:
    source = sources.find(str(place))
    reader = RecordReader(detect_source(source, PrepareConfig(), section="prepare"), "corpus")
    ranges = list(sources.split(source, None, 10))
    return [row for part in ranges for record in sources.read(part) for row in reader.rows(record)]


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_every_format_has_the_same_splits(record: dict[str, Any]) -> None:
    assert row_of(record).split == "train"
    assert row_of(record, "test.jsonl").split == row_of(record, "test/a.jsonl").split == "test"
    for name in ("split", "Split", "SPLIT"):
        assert row_of({**record, name: "Val"}, "test.jsonl").split == "validation"
    assert row_of({**record, "split": None}, "val-00000.jsonl").split == "validation"


def test_a_split_within_the_json_of_a_tar_counts() -> None:
    assert row_of({**RECORDS["webdataset"], "json": {"caption": "t", "split": "dev"}}).split == "validation"


def test_evaluation_rows_of_mmeb_are_for_tests_unless_a_column_says_otherwise() -> None:
    record = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a"], "tgt_img_path": [""]}
    assert (row_of(record).split, row_of({**record, "split": "dev"}).split) == ("test", "validation")


def test_what_counts_first() -> None:
    everything = {"file": "val/x.json", "folder": "test", "within": "test"}
    assert split_of({"split": "extra"}, **everything) == "extra"
    assert split_of({"split": " "}, **everything) == "validation"
    assert split_of({}, "x.json", folder="test", within="validation") == "test"
    assert split_of({}, "x.json", within="validation") == "validation"
    assert split_of({}, "x.json", within="data") == "train"
    assert split_of({}, "val/test-00.parquet") == "test"


@pytest.mark.parametrize("name", ["Val", "VALID", "dev", "val2017", "Test_A", "Train", "dev-clean", "restval", "eval"])
def test_words_of_publishers_become_splits_that_jobs_read(name: str) -> None:
    assert split_named(name).startswith(READ_SPLITS)
    assert split_named("val2017") == "validation2017" and split_named("dev-clean") == "validation-clean"
    assert split_named("held out") == "held out" and split_named("device") == "device"


def test_a_corpus_has_the_split_that_its_folder_is_called() -> None:
    for uri in ("s3://b/c/test", "/c/split=test/", "/c/test/data", "/c/Test/rows", "/c/test/lang=en"):
        assert split_of_folder(uri) == "test"
    for uri in ("/home/test/photos", "/c/my_test_corpus", "/dev/shm/c", "s3://b"):
        assert split_of_folder(uri) is None


def test_a_folder_says_its_split_however_it_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "c" / "test" / "a.jsonl", [RECORDS["crem"]])
    write_rows(tmp_path / "c" / "split=Val" / "a.jsonl", [{**RECORDS["crem"], "key": "2"}])
    assert [row.split for row in read(tmp_path / "c")] == ["validation", "test"]
    for place in ("test", "test/*.jsonl", "test/a.jsonl"):
        assert [row.split for row in read(tmp_path / "c" / place)] == ["test"]
    assert [row.split for row in read(tmp_path / "c" / "split=Val")] == ["validation"]


def test_the_list_of_a_json_document_says_its_split(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.json").write_text(json.dumps({"version": "1", "test": [RECORDS["crem"]]}))
    (tmp_path / "c" / "train.json").write_text(json.dumps({"test": [RECORDS["crem"]]}))
    assert [row.split for row in read(tmp_path / "c")] == ["test", "train"]
