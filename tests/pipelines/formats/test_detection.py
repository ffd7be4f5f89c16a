"""What the driver recognises, refuses and says about the columns of a corpus, alike in every container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crem.config import EmbedConfig, PrepareConfig
from crem.errors import ConfigError, ItemError
from pipelines.formats.detection import Detection, detect_source
from pipelines.formats.record_reader import RecordReader
from pipelines.formats.sampling import chosen_files
from pipelines.formats.unknown_columns import MAX_NAMES, UnknownColumns, nearest_name
from pipelines.sources import sources
from pipelines.sources.records import RawRecord, SourceRow
from tests.pipelines.conftest import write_rows

PAIR = {"query_text": "q", "target_text": "t"}


def detected(folder: Path, rows: list[RawRecord], kind: str = "jsonl", **settings: Any) -> Detection:
    write_rows(folder / f"r.{kind}", rows)
    return detect_source(sources.find(str(folder)), PrepareConfig(**settings), section="prepare")


def record(values: RawRecord | None, error: str = "") -> SourceRow:
    return SourceRow("@f/r.jsonl#0", values, error, "r.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        *[("query_image", "query_images"), ("negative", "negatives"), ("Query_Text", "query_text")],
        *[("target-images", "target_images"), ("awnser", "answer"), ("target_txt", "target_text")],
    ],
)
def test_a_misspelt_column_is_refused_with_both_names(tmp_path: Path, kind: str, wrong: str, meant: str) -> None:
    row = {k: v for k, v in PAIR.items() if k != meant} | {wrong: "x"}
    with pytest.raises(ConfigError, match=rf"{wrong!r}.*did you mean {meant!r}.*prepare\.columns=.*allow_unknown=true"):
        detected(tmp_path / "a", [row], kind)
    went_on = detected(tmp_path / "a", [row], kind, allow_unknown=True)
    assert [(c.name, c.nearest) for c in went_on.layouts[0].of_use("unknown")] == [(wrong, meant)]
    mapped = detected(tmp_path / "a", [row], kind, columns={wrong: meant})
    assert mapped.layouts[0].of_use("unknown") == []


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_unknown_columns_are_said_with_their_rows(tmp_path: Path, kind: str) -> None:
    found = detected(tmp_path, [{**PAIR, "licence": "MIT"}, {**PAIR, "licence": "BSD"}], kind)
    assert [(c.name, c.use, c.nearest) for c in found.layouts[0].of_use("unknown")] == [("licence", "unknown", None)]
    reader = RecordReader(found, "s")
    for _ in range(3):
        reader.rows(record({**PAIR, "licence": "MIT"}))
    assert found.warnings(reader.unknown) == ["column 'licence' is not known to crem and is not read (3 rows)"]
    assert detected(tmp_path, [{**PAIR, "licence": "MIT"}], kind, columns={"licence": None}).warnings() == []


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_with_no_known_column_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        ConfigError, match=r"columns \['foo', 'bar'\]; none of them is known.*prepare\.columns=.*\*\.parquet"
    ):
        detected(tmp_path / "a", [{"foo": 1, "bar": 2}], kind)
    with pytest.raises(ConfigError, match="Did you mean 'query_images' by 'query_image'"):
        detected(tmp_path / "b", [{"query_image": "a", "bar": 2}], kind)
    with pytest.raises(ConfigError, match="has texts and no images.*query_text"):
        detected(tmp_path / "c", [{"caption": "c"}], kind)


def test_keys_that_appear_later_are_counted_and_misspelt_ones_reject_their_row(tmp_path: Path) -> None:
    reader = RecordReader(detected(tmp_path, [PAIR]), "s")
    assert reader.rows(record({**PAIR, "note": 1}))[0].query.text == "q"
    with pytest.raises(ItemError, match="unknown_column: 'query_image' is not known to crem; is it 'query_images'"):
        reader.rows(record({**PAIR, "query_image": "a.jpg"}))
    with pytest.raises(ItemError, match="unknown_columns: crem knows none of the columns"):
        reader.rows(record({"photo": "a.jpg"}))
    with pytest.raises(ItemError, match="bad_row: not JSON"):
        reader.rows(record(None, "not JSON"))
    assert reader.unknown.counts == {"note": 1, "query_image": 1, "photo": 1}
    # a name that is near to one that the row has is another column, not a misspelt one
    assert reader.rows(record({**PAIR, "query_text2": "x"}))


def test_names_inside_of_negatives_are_checked_as_columns_are(tmp_path: Path) -> None:
    def row(*negatives: RawRecord) -> RawRecord:
        return {**PAIR, "negatives": list(negatives)}

    for number, (wrong, meant) in enumerate([("image", "images"), ("txt", "text"), ("Text", "text")]):
        with pytest.raises(ConfigError, match=rf"'negatives\[\].{wrong}'.*mean '\S*{meant}'\? Rename it; prep"):
            detected(tmp_path / str(number), [row({"images": ["a.jpg"], "text": "n"}, {wrong: "b"})])
    with pytest.raises(ConfigError, match=r"negatives\[\]\.image'"):
        detected(tmp_path / "one", [row({"text": "n", "image": "b.jpg"})])
    found = detected(tmp_path / "good", [row({"text": "n", "images": ["a.jpg"]}, {"instruction": "i", "score": 1})])
    assert {c.name: c.use for c in found.layouts[0].columns if "[" in c.name} == {
        "negatives[].instruction": "used",
        "negatives[].score": "unknown",
    }
    reader = RecordReader(found, "s")
    assert reader.rows(record(row({"text": "n", "score": 1, "image": None})))[0].negatives[0].text == "n"
    assert reader.unknown.counts == {"negatives[].score": 1}
    with pytest.raises(ItemError, match=r"unknown_column: 'negatives\[\].image' .*is it 'negatives\[\].images'"):
        reader.rows(record(row({"text": "n", "image": "b.jpg", "images": None})))  # as Parquet has it


def test_settings_that_name_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no format is named 'crm'; did you mean 'crem'"):
        detected(tmp_path, [PAIR], format="crm")
    with pytest.raises(ConfigError, match="maps 'a' to 'query_txt', which no format knows; did you mean 'query_text'"):
        detected(tmp_path, [PAIR | {"a": 1}], columns={"a": "query_txt"})
    with pytest.raises(ConfigError, match=r"prepare.columns names 'b', and no sampled file"):
        detected(tmp_path, [PAIR | {"a": 1}], columns={"b": "query_text"})
    with pytest.raises(ConfigError, match="has a column 'query_text' already"):
        detected(tmp_path, [PAIR | {"a": 1}], columns={"a": "query_text"})


def test_any_table_is_read_by_a_mapping_of_its_columns(tmp_path: Path) -> None:
    found = detected(
        tmp_path,
        [{"frage": "was?", "bild": "a.jpg", "x": 1}],
        columns={"frage": "query_text", "bild": "target_images", "x": None},
    )
    assert found.formats == ("crem",)
    row = RecordReader(found, "s").rows(record({"frage": "was?", "bild": "a.jpg", "x": 1}))[0]
    assert (row.query.text, row.target.images) == ("was?", ("a.jpg",))


def test_pairs_are_embedded_one_side_at_a_time(tmp_path: Path) -> None:
    write_rows(tmp_path / "r.jsonl", [PAIR])
    corpus = sources.find(str(tmp_path))
    with pytest.raises(ConfigError, match=r"two sides.*embed\.side=query or embed\.side=target"):
        detect_source(corpus, EmbedConfig(), section="embed")
    for side, text in (("query", "q"), ("target", "t")):
        found = detect_source(corpus, EmbedConfig.model_validate({"side": side}), section="embed")
        assert RecordReader(found, "s").item(record(dict(PAIR))).text == text


def test_files_are_chosen_from_every_folder_first() -> None:
    names = [f"{folder}/{i:03}.parquet" for folder in "abcde" for i in range(100)] + ["a/x.jsonl"]
    chosen = chosen_files(names, 8)
    assert {"a/x.jsonl", *(f"{folder}/000.parquet" for folder in "abcde")} <= set(chosen)
    assert len(chosen) <= 8
    assert len(chosen_files([f"{i}/a.parquet" for i in range(1000)], 64)) <= 64
    assert chosen_files(names[:3], 8) == names[:3]


def test_unknown_names_are_bounded_and_add_up() -> None:
    counts = UnknownColumns()
    counts.add(f"c{i}" for i in range(MAX_NAMES + 5))
    other = UnknownColumns()
    other.add(["c0", "new"])
    counts.merge(other)
    assert (len(counts.counts), counts.counts["c0"], counts.others) == (MAX_NAMES, 2, 6)


def test_names_are_near_only_if_they_are_misspelt() -> None:
    known = ["query_images", "image", "split", "text"]
    near = {"SPLIT": "split", "query-images": "query_images", "query_image": "query_images", "tetx": "text"}
    for name, expected in {**near, "image_id": None, "width": None}.items():
        assert nearest_name(name, known) == expected
    assert nearest_name("split", known) is None
