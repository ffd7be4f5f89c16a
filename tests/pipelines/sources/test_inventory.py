"""Which files are read, and that every other one is accounted for; on a local disk and on S3."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import s3fs

from crem.errors import ConfigError
from pipelines.sources import sources
from pipelines.sources.source_files import SourceFiles
from tests.pipelines.sources.written import records_of, rows_of, write
from tests.s3_server import S3Server

L = b'{"a": 1}\n'
NESTED = {
    "b.csv": b"a\n1\n", "x/y/a.jsonl": L, "x/.git/c.jsonl": L, "_tmp/c.jsonl": L, ".c.jsonl": L, "x/1.jpg": b"",
    "images/c.jsonl": L, "images/2.jpg": b"", "photos.zip": b"", "README.md": b"", "x/dataset_info.json": b"{}",
    "notes.txt": b"", "old.arrow": b"", "d.jsonl.partial": L, "clip.mp4": b"",
}  # fmt: skip


def ignored_of(source: SourceFiles) -> dict[str, tuple[int, tuple[str, ...], bool]]:
    return {i.kind: (i.count, i.names, i.expected) for i in source.ignored}


@pytest.mark.parametrize("store", ["local", "s3"])
def test_every_file_is_read_or_accounted_for(
    tmp_path: Path, store: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    place = write(tmp_path / "c", NESTED)
    if store == "s3":
        server: S3Server = request.getfixturevalue("s3_env")
        place = f"s3://{server.bucket}/nested"
        s3fs.S3FileSystem().put(f"{tmp_path}/c/", f"{server.bucket}/nested/", recursive=True)
    with caplog.at_level(logging.INFO):
        source = sources.find(place)
    assert source.names == ("b.csv", "x/y/a.jsonl")
    assert ignored_of(source) == {
        "hidden": (3, (".c.jsonl", "_tmp/", "x/.git/"), True),
        "folders of images": (1, ("images/",), True),
        "images": (1, ("x/1.jpg",), True),
        "archives": (1, ("photos.zip",), True),
        "documents": (1, ("README.md",), True),
        "metadata": (1, ("x/dataset_info.json",), True),
        "unknown": (1, ("notes.txt",), False),
        "other tables": (1, ("old.arrow",), False),
        "unfinished": (1, ("d.jsonl.partial",), False),
        "media": (1, ("clip.mp4",), False),
    }
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for name in ("notes.txt", "old.arrow", "d.jsonl.partial", "clip.mp4", "1 of CSV or TSV, 1 of JSON lines"):
        assert sum(name in message for message in warned) == 1, warned
    assert [s.size for s in sources.stamps(source)] == [4, 9] and all(s.version for s in sources.stamps(source))
    assert records_of(place) == [{"a": "1"}, {"a": 1}]


def test_rows_means_that_the_table_is_there(tmp_path: Path) -> None:
    files = {
        "rows/a.jsonl": L, "rows/b/c.jsonl": L, "rows/d.txt": b"", "e.ndjson": L, "more/f.parquet": b"",
        "images/1.png": b"", "images.zip": b"",
    }  # fmt: skip
    source = sources.find(write(tmp_path, files))
    assert source.names == ("a.jsonl", "b/c.jsonl") and source.root.uri == str(tmp_path)
    assert ignored_of(source) == {
        "beside rows/": (1, ("e.ndjson",), False),
        "folders beside rows/": (1, ("more/",), False),
        "unknown": (1, ("d.txt",), False),
        "folders of images": (1, ("images/",), True),
        "archives": (1, ("images.zip",), True),
    }
    os.remove(tmp_path / "rows" / "a.jsonl")
    os.remove(tmp_path / "rows" / "b" / "c.jsonl")
    assert sources.find(str(tmp_path)).names == ("e.ndjson", "more/f.parquet"), "rows/ holds none"


def test_folders_of_partitions_are_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "split=train/lang=en%2FGB/a.jsonl": L,
        "split=test/lang=__HIVE_DEFAULT_PARTITION__/a.jsonl": L,
        "split=test/lang=de/b.jsonl": b'{"a": 2, "split": "train"}\n{"a": 3, "split": "test"}\n',
    }
    place = write(tmp_path, files)
    rows = [row for row in records_of(place) if row]
    assert rows == [
        {"split": "test", "lang": None, "a": 1},
        {"split": "train", "lang": "de", "a": 2},
        {"split": "test", "lang": "de", "a": 3},
        {"split": "train", "lang": "en/GB", "a": 1},
    ]
    assert caplog.text.count("column 'split' is 'train' in the file and 'test' in its path; the file's counts") == 1
    part = next(sources.split(sources.find(place), None, 8))
    assert set(sources.schema_of(part).columns) == {"a", "split", "lang"}
    assert records_of(f"{place}/split=test/lang=de")[1] == {"split": "test", "lang": "de", "a": 3}
    assert len({row.name for row in rows_of(place)}) == 4


def test_a_pattern_names_files(tmp_path: Path) -> None:
    files = {"train-0.jsonl": L, "train-1.jsonl": L, "test-0.jsonl": L, "x/y/train-2.jsonl": L, "config.json": b"{"}
    place = write(tmp_path, files)
    for pattern, names in {
        "train-*.jsonl": ("train-0.jsonl", "train-1.jsonl"),
        "**/train-[02].jsonl": ("train-0.jsonl", "x/y/train-2.jsonl"),
        "t??t-0.jsonl": ("test-0.jsonl",),
    }.items():
        source = sources.find(f"{place}/{pattern}")
        assert source.names == names and source.root.uri == str(tmp_path), pattern
    assert sources.find(f"{place}/x/*/*").names == ("y/train-2.jsonl",)
    with pytest.raises(ConfigError, match="holds no rows.*the pattern does not name them"):
        sources.find(f"{place}/*.parquet")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"_delta_log/0.json": b"", "a.parquet": b""}, "Delta Lake table.*deleted or replaced; export"),
        ({"metadata/v1.metadata.json": b"", "data/a.parquet": b""}, "Iceberg table"),
        ({"a.arrow": b"", "b.xyz": b""}, r"holds no rows.*1 other tables \(a\.arrow\).*1 unknown \(b\.xyz\)"),
        ({}, "does not exist"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, files: dict[str, bytes], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        sources.find(write(tmp_path / "c", files))


def test_metadata_of_an_imagefolder_are_its_rows(tmp_path: Path) -> None:
    files = {"train/metadata.csv": b"file_name,text\n1.jpg,a\n", "train/1.jpg": b"", "test/metadata.jsonl": L}
    assert [(row.folder, row.record) for row in rows_of(write(tmp_path, files))] == [
        ("test", {"a": 1}),
        ("train", {"file_name": "1.jpg", "text": "a"}),
    ]


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    write(tmp_path / "blobs", {"abc": L})
    corpus = tmp_path / "snapshot" / "data"
    corpus.mkdir(parents=True)
    (corpus / "a.jsonl").symlink_to("../../blobs/abc")
    (corpus / "gone.jsonl").symlink_to("../../blobs/nothing")
    (corpus / "up").symlink_to("..")
    (corpus / "\udcff.jsonl").write_bytes(L)
    source = sources.find(str(tmp_path / "snapshot"))
    assert source.names == ("data/a.jsonl",)
    kinds = ignored_of(source)
    assert kinds["broken links"] == (1, ("data/gone.jsonl",), False) and kinds["names that are not UTF-8"][0] == 1
    assert kinds["unknown"] == (1, ("data/up",), False)


def test_many_files_are_listed_in_order_and_chunks_are_small(tmp_path: Path) -> None:
    for i in range(30):
        write(tmp_path / f"d{i:02}", {f"{j:02}.jsonl": L for j in range(40)})
    source = sources.find(str(tmp_path))
    assert source.names == tuple(f"d{i:02}/{j:02}.jsonl" for i in range(30) for j in range(40))
    chunk = source.chunk(41, 43)
    assert chunk.names == ("d01/01.jsonl", "d01/02.jsonl")
    ranges = list(sources.split(source, None, 10))
    assert [part.file for part in ranges] == list(source.names), "in the order of the files, whatever thread is first"
    assert [sum(part.rows for part in group) for group in sources.group(ranges, 500)] == [500, 500, 200]


def test_captions_of_coco_are_read_and_its_other_annotations_said(tmp_path: Path) -> None:
    coco = b'{"annotations": [{"id": 1}], "images": []}'
    kinds = ("captions", "instances", "person_keypoints")
    files = {f"annotations/{kind}_{part}2017.json": coco for kind in kinds for part in ("train", "val")}
    place = write(tmp_path / "c", {**files, "train2017/1.jpg": b"", "val2017/1.jpg": b""})
    source = sources.find(place)
    assert source.names == ("annotations/captions_train2017.json", "annotations/captions_val2017.json")
    assert ignored_of(source)["other annotations of COCO"][0] == 4
    alone = write(tmp_path / "alone", {"instances_a.json": coco})
    assert sources.find(alone).names == ("instances_a.json",)


def test_images_of_coco_are_beside_its_annotations(tmp_path: Path) -> None:
    coco = b'{"annotations": [], "images": []}'
    place = write(tmp_path / "c", {"annotations/captions_val2017.json": coco, "val2017/1.jpg": b""})
    for named in ("annotations", "annotations/captions_*.json", "annotations/captions_val2017.json"):
        source = sources.find(f"{place}/{named}")
        assert (source.root.uri, source.folder.uri) == (place, f"{place}/annotations"), named
        assert source.names == ("captions_val2017.json",)
    place = write(
        tmp_path / "d", {"texts/captions_val2017.json": coco, "texts/val2017/1.jpg": b"", "val2017/1.jpg": b""}
    )
    assert sources.find(f"{place}/texts").root.uri == f"{place}/texts"
    place = write(tmp_path / "e", {"texts/captions_mine.json": coco})
    assert sources.find(f"{place}/texts").root.uri == f"{place}/texts"
