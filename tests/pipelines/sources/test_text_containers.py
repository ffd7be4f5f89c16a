"""JSON lines, JSON documents, CSV and TSV, as their publishers write them and as files arrive."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from crem.errors import ConfigError
from pipelines.sources import sources
from tests.pipelines.sources.written import ranges_of, records_of, rows_of, write

COMPRESS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]),  # several members, as cat writes them
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: b"".join(pa.Codec("zstd").compress(part, asbytes=True) for part in (data[:50], data[50:])),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_text_is_read_whole_under_every_compression(tmp_path: Path, suffix: str, compression: str) -> None:
    rows = [{"key": str(i), "text": f"Grüße {i}"} for i in range(11)]
    if suffix in (".csv", ".tsv"):
        data = pd.DataFrame(rows).to_csv(index=False, sep="\t" if suffix == ".tsv" else ",").encode()
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    place = write(tmp_path, {f"a{suffix}{compression}": COMPRESS[compression](data)})
    assert records_of(place) == rows
    assert [part.rows for part in ranges_of(place)] == ([11] if compression else [3, 3, 3, 2])
    if compression:
        cut = (tmp_path / f"a{suffix}{compression}").read_bytes()[:-6]
        (tmp_path / f"a{suffix}{compression}").write_bytes(cut)
        with pytest.raises(ConfigError, match=rf"a\{suffix}\{compression} cannot be read.*replace it"):
            ranges_of(place)


def test_a_bad_line_of_json_is_one_bad_row(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"a": 1}\r\n', b'{"a": NaN, "b": [Infinity]}\n', b"\n", b"   \r\n",
        b'{"a": 1, "b": {"c": 1, "c": 2}}\n', b'{"a": "\xff"}\n', b"[1]\n", b'{"a": \n', b"[" * 99_999 + b"\n",
        b'{"a": 2}',
    ]  # fmt: skip
    rows = rows_of(write(tmp_path, {"a.jsonl": b"".join(lines)}))
    assert rows[0].record == {"a": 1}
    assert repr(rows[1].record) == "{'a': nan, 'b': [inf]}"
    assert rows[-1].record == {"a": 2}
    expected = [
        "'c' stands twice",
        "codec can't decode",
        "a JSON list, not an object",
        "not a line of JSON",
        "recursion",
    ]
    assert [row.record for row in rows[2:-1]] == [None] * 5
    for row, why in zip(rows[2:-1], expected, strict=True):
        assert why in row.parse_error


def test_a_line_longer_than_the_limit_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.sources import jsonl_rows

    monkeypatch.setattr(jsonl_rows.physical_lines, "__defaults__", (1000,))
    long = json.dumps({"a": "x" * 2990}).encode()
    rows = rows_of(write(tmp_path, {"a.jsonl": b'{"a": 1}\n' + long + b'\n{"a": 2}\n'}))
    assert [row.record for row in rows] == [{"a": 1}, None, {"a": 2}]


def test_utf_16_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(ConfigError, match=rf"{name} cannot be read.*UTF-16; convert it"):
            ranges_of(write(tmp_path / name, {name: "a,b\n1,2\n".encode("utf-16")}))


LLAVA = [
    {
        "id": f"{i:012}",
        "image": f"coco/train2017/{i:012}.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat ☃?"}, {"from": "gpt", "value": f"A snowman {i}."}],
    }
    for i in range(10)
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_list_of_objects_is_read_by_ranges_of_bytes(tmp_path: Path, indent: int | None, ascii_only: bool) -> None:
    place = write(tmp_path, {"llava.json": json.dumps(LLAVA, indent=indent, ensure_ascii=ascii_only).encode()})
    assert records_of(place) == LLAVA
    parts = ranges_of(place)
    assert [part.rows for part in parts] == [3, 3, 3, 1]
    assert [row.record for row in sources.read(parts[2])] == LLAVA[6:9]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_document_is_read_through_a_small_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Every value is cut at every place: a character, a number, an escape."""
    from pipelines.sources import json_scanner

    monkeypatch.setattr(json_scanner, "_CHUNK_BYTES", chunk)
    rows = [{"n": -12.5e3, "t": 'ä"\\ \u2028 🍎', "l": [1, {"x": None}]}, {"n": 123456, "t": ""}]
    text = "\ufeff" + json.dumps({"version": 123, "data": rows, "end": True}, ensure_ascii=False, indent=1)
    assert records_of(write(tmp_path, {"a.json": text.encode()}), 1) == rows


def test_captions_of_coco_are_joined_with_their_images(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i:012}.jpg", "height": 480, "license": 1} for i in (7, 5)]
    annotations: list[Any] = [
        {"image_id": 5, "id": 90, "caption": "a dog"},
        {"image_id": 7, "id": 91, "caption": "a cat"},
        {"image_id": 5, "id": 92, "caption": "the dog again"},
        {"image_id": 6, "id": 93, "caption": "of nothing"},
    ]
    licenses = [{"id": 1, "name": "CC"}]
    coco = {"info": {"year": 2017}, "licenses": licenses, "images": images, "annotations": annotations}
    for document in (coco, dict(reversed(coco.items()))):
        rows = rows_of(write(tmp_path, {"captions_train2017.json": json.dumps(document).encode()}), 2)
        assert [row.record for row in rows[:3]] == [
            {"id": 90, "image_id": 5, "caption": "a dog", "file_name": "000000000005.jpg", "height": 480, "license": 1},
            {"id": 91, "image_id": 7, "caption": "a cat", "file_name": "000000000007.jpg", "height": 480, "license": 1},
            {**images[1], "id": 92, "image_id": 5, "caption": "the dog again"},
        ]
        assert rows[3].record is None and "image_id 6 is missing" in rows[3].parse_error
    del coco["annotations"]
    assert records_of(write(tmp_path, {"captions_train2017.json": json.dumps(coco).encode()})) == images


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'[{"a": 1}, {"a": 2}', "byte 19"),
        (b'[{"a": 1}, {a: 2}]', "byte 11.*double quotes"),
        (b'[{"a": 1}] [', r"byte 11.*follows the document"),
        (b"[1, 2]", "not of objects"),
        (b'{"a": {"b": 1}}', "no list of objects.*pattern"),
        (b'{"x": [{"a": 1}], "y": [{"a": 1}]}', r"several lists of objects, \['x', 'y'\]"),
        (b"", "byte 0"),
    ],
)
def test_a_document_that_does_not_say_its_rows_is_refused(tmp_path: Path, text: bytes, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"a\.json.*{why}"):
        ranges_of(write(tmp_path, {"a.json": text}))


def test_a_bad_object_in_a_document_is_one_bad_row(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path, {"a.json": b'[{"a": 1, "a": 2}, {"a": "\xff\xfe"}, 7, {"a": NaN}]'}))
    assert ["stands twice" in rows[0].parse_error, "not UTF-8" in rows[1].parse_error] == [True, True]
    assert "a JSON int" in rows[2].parse_error and repr(rows[3].record) == "{'a': nan}"


def test_what_pandas_and_csv_write_comes_back(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "text": 'she said "hi", twice', "url": "https://x/a.jpg?b=1,2"},
        {"id": "2", "text": "two\nlines\r\nand a third", "url": ""},
        {"id": "3", "text": "", "url": "ü\tü"},
        {"id": "4", "text": '"', "url": " x "},
    ]
    for name, options in {
        "a.csv": {}, "b.tsv": {"sep": "\t"}, "c.csv": {"sep": ";"}, "d.csv": {"quoting": csv.QUOTE_ALL},
        "e.csv": {"encoding": "utf-8-sig", "lineterminator": "\r\n"}, "f.csv": {"sep": "|"},
    }.items():  # fmt: skip
        path = tmp_path / name / name
        path.parent.mkdir()
        pd.DataFrame(rows).to_csv(path, index=False, **options)
        for size in (1, 3):
            assert records_of(str(path), size) == rows, name
    path.write_text("")
    assert records_of(str(path)) == []
    write(tmp_path / "one", {"x.csv": b"text\nhello\n\nworld"})
    assert records_of(str(tmp_path / "one")) == [{"text": "hello"}, {"text": "world"}]


def test_a_damaged_record_of_csv_costs_one_row(tmp_path: Path) -> None:
    lines = [
        b"id,text", b'1,"never closed', b"2,fine", b'3,5" screen', b"4", b"5,a,b", b"6,\xff", b'7,"a" b',
        b'8,"a ""b"""', b'9,"open again', b"10,last",
    ]  # fmt: skip
    rows = rows_of(write(tmp_path, {"a.csv": b"\n".join(lines)}))
    good = {"2": "fine", "3": '5" screen', "8": 'a "b"', "10": "last"}
    assert {row.record["id"]: row.record["text"] for row in rows if row.record} == good
    assert [("never closed" in r.parse_error) for r in rows if not r.record] == [True, False, False, False, False, True]
    assert len(rows) == len(lines) - 1


def test_quotes_of_two_lines_of_a_tsv_do_not_join_them(tmp_path: Path) -> None:
    text = 'caption\turl\n"Beautiful sunset\ta.jpg\nanother one"\tb.jpg\n"of two\nlines"\tc.jpg\n'
    assert records_of(write(tmp_path, {"a.tsv": text.encode()})) == [
        {"caption": '"Beautiful sunset', "url": "a.jpg"},
        {"caption": 'another one"', "url": "b.jpg"},
        {"caption": "of two\nlines", "url": "c.jpg"},
    ]


def test_a_first_caption_that_begins_with_a_quote(tmp_path: Path) -> None:
    text = b'"hello" said he\thttp://a/1.jpg\nb\thttp://a/2.jpg\n'
    assert [r and r["caption"] for r in records_of(write(tmp_path, {"a.tsv": text}))] == ['"hello" said he', "b"]


def test_lines_that_end_with_a_carriage_return_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="end with a carriage return alone; end them with a line feed"):
        records_of(write(tmp_path, {"a.csv": b"caption,image\ra,1.jpg\rb,2.jpg\r"}))


def test_a_name_with_half_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    record = b'{"\\ud800x": 1, "text": "a"}'
    place = write(tmp_path, {"a.jsonl": record + b"\n", "b.json": b"[" + record + b"]"})
    assert records_of(place) == [{"\\ud800x": 1, "text": "a"}] * 2


def test_a_quote_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    text = 'caption\turl\n"the best" pizza\thttp://a/1.jpg\n"an open quote\thttp://a/2.jpg\n27" wheel\thttp://a/3.jpg\n'
    captions = ['"the best" pizza', '"an open quote', '27" wheel']
    assert [r["caption"] for r in records_of(write(tmp_path, {"cc3m.tsv": text.encode()})) if r] == captions


def test_a_table_without_a_header_and_one_with_two_equal_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Train_GCC\.tsv begins with 'http://a/1\.jpg'.*names of the columns first"):
        ranges_of(
            write(tmp_path / "1", {"Train_GCC.tsv": b"a caption\thttp://a/1.jpg\t1\nanother\thttp://a/2.jpg\t2\n"})
        )
    with pytest.raises(ConfigError, match=r"several columns of one name, \['text'\]; rename"):
        ranges_of(write(tmp_path / "2", {"a.csv": b"text,url,text\n1,2,3\n"}))
    indexed = io.StringIO()
    pd.DataFrame({"a": ["x"]}).to_csv(indexed)
    assert records_of(write(tmp_path / "3", {"a.csv": indexed.getvalue().encode()})) == [{"Unnamed: 0": "0", "a": "x"}]
