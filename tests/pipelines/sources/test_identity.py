"""Keys of rows that have none, and files that change in mid-run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from crem.errors import ConfigError
from pipelines.sources import sources
from pipelines.tables.schema import row_id
from tests.pipelines.sources.written import ranges_of, rows_of, write
from tests.s3_server import S3Server


def ids(place: str) -> list[int]:
    source = place.rstrip("/").rpartition("/")[2]
    return [row_id(source, row.name) for row in rows_of(place)]


def test_ids_stay_when_a_corpus_moves_and_differ_between_corpora(tmp_path: Path, s3_env: S3Server) -> None:
    files = {"data/a.jsonl": b'{"a": 1}\n{"a": 2}\n', "data/b.csv": b"a\n1\n", "lang=de/c.jsonl": b'{"a": 1}\n'}
    first = ids(write(tmp_path / "first", files))
    shutil.copytree(tmp_path / "first", tmp_path / "renamed")
    os.utime(tmp_path / "renamed" / "data" / "a.jsonl", (1, 1))
    s3fs.S3FileSystem().put(f"{tmp_path}/first/", f"{s3_env.bucket}/moved/", recursive=True)
    assert first == ids(str(tmp_path / "renamed")) == ids(f"s3://{s3_env.bucket}/moved")
    other = ids(write(tmp_path / "other" / "first", {name: data.replace(b"1", b"7") for name, data in files.items()}))
    assert len({*first, *other}) == 8, "another corpus of the same names and sizes"
    images = ids(write(tmp_path / "i1", {"cat/1.jpg": b"x", "cat/2.jpg": b"xx"}))
    assert images == ids(write(tmp_path / "i2", {"cat/1.jpg": b"x", "cat/2.jpg": b"xx"}))
    assert images[0] not in ids(write(tmp_path / "i3", {"cat/1.jpg": b"x", "cat/2.jpg": b"xxx"}))


def test_the_source_counts_for_a_row_with_a_key_of_its_own() -> None:
    assert row_id("a", "1") != row_id("b", "1")
    assert row_id("a", "@0123456789abcdef/x.jsonl#1/2") == row_id("b", "@0123456789abcdef/x.jsonl#1/2")
    assert row_id("a", "@0123456789abcde/x.jsonl#1") != row_id("b", "@0123456789abcde/x.jsonl#1")


def test_large_files_that_differ_in_the_middle_differ(tmp_path: Path) -> None:
    data = b'{"a": 1}\n' * 200_000
    middle = len(data) // 2 - 10
    changed = data[:middle] + data[middle:].replace(b"1", b"2", 1)
    names = {
        ranges_of(write(tmp_path / n, {"a.jsonl": d}), 10**6)[0].fingerprint for n, d in (("1", data), ("2", changed))
    }
    assert len(names) == 2


@pytest.mark.parametrize(
    ("name", "store"),
    [*((name, "local") for name in ("a.parquet", "a.jsonl", "a.json", "a.csv", "a.tar")), ("a.parquet", "s3")],
)
def test_a_file_that_is_replaced_by_one_of_as_many_rows_is_noticed(
    tmp_path: Path, name: str, store: str, request: pytest.FixtureRequest
) -> None:
    from tests.pipelines.sources.written import tar

    def content(text: str) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"a": [text] * 90}), sink)
        return {
            "a.parquet": sink.getvalue().to_pybytes(), "a.jsonl": b'{"a": "%s"}\n' % text.encode() * 90,
            "a.json": b"[" + b",".join([b'{"a": "%s"}' % text.encode()] * 90) + b"]",
            "a.csv": b"a\n" + f"{text}\n".encode() * 90, "a.tar": tar([(f"{i}.txt", text.encode()) for i in range(90)]),
        }[name]  # fmt: skip

    place = str(tmp_path)
    if store == "s3":
        server: S3Server = request.getfixturevalue("s3_env")
        place = f"s3://{server.bucket}/replaced-{name}"

    def put(text: str) -> None:
        if store == "local":
            (tmp_path / name).write_bytes(content(text))
        else:
            s3fs.S3FileSystem().pipe_file(f"{place[5:]}/{name}", content(text))

    put("x")
    source = sources.find(place)
    [part, *_] = ranges_of(place, 90)
    reading = sources.read(part)
    next(reading)
    put("y")
    with pytest.raises(ConfigError, match=rf"{name} has changed since this job began.*run again"):
        list(reading)
    with pytest.raises(ConfigError, match="has changed since this job began"):
        next(sources.read(part))
    for part in sources.split(source, None, 90):  # listed before, split after: found when it is read
        with pytest.raises(ConfigError, match="has changed since this job began"):
            list(sources.read(part))
