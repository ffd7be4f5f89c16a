"""Parquet, WebDataset tars, Lance and folders of images."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import pickle
import random
import tarfile
import uuid
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from crem.errors import ConfigError
from pipelines.sources import image_rows, listing, parquet_rows, sources, tar_rows
from tests.pipelines.sources.written import ranges_of, records_of, rows_of, tar, write
from tests.s3_server import S3Server


def test_every_arrow_type_becomes_what_json_would_give(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 1, 2, 3, 4, 5)
    columns = {
        "dictionary": pa.array(["a", "b"]).dictionary_encode(),
        "large": pa.array(["a", None], pa.large_string()),
        "view": pa.array(["a", "b"], pa.string_view()),
        "whole": pa.array([decimal.Decimal("12"), None], pa.decimal128(20, 0)),
        "fraction": pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.00")], pa.decimal128(9, 2)),
        "unsigned": pa.array([2**64 - 1, 0], pa.uint64()),
        "half": pa.array([1.5, None], pa.float32()).cast(pa.float16()),
        "time": pa.array([day, None], pa.timestamp("ns")),
        "nested": pa.array([[{"bytes": b"\x89", "path": None}], []]),
        "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8())),
        "uuid": pa.array([uuid.UUID(int=7).bytes, None], pa.binary(16)).cast(pa.uuid()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    first, second = records_of(str(tmp_path))
    assert first == {
        "dictionary": "a", "large": "a", "view": "a", "whole": 12, "fraction": "1.50", "unsigned": 2**64 - 1,
        "half": 1.5, "time": "2026-01-02T03:04:05", "nested": [{"bytes": b"\x89", "path": None}], "map": {"k": 1},
        "uuid": "00000000-0000-0000-0000-000000000007",
    }  # fmt: skip
    assert second is not None and second["large"] is None and second["map"] == {} and second["fraction"] == 2


def test_large_row_groups_are_cut_and_small_ones_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(50)]}), path, row_group_size=20)
    assert [(p.first, p.rows, p.skip) for p in ranges_of(str(path), 8)] == [
        (0, 8, 0), (8, 8, 8), (16, 4, 16), (20, 8, 0), (28, 8, 8), (36, 4, 16), (40, 8, 0), (48, 2, 8),
    ]  # fmt: skip
    assert [p.rows for p in ranges_of(str(path), 45)] == [40, 10]
    monkeypatch.setattr(parquet_rows, "_RESPLIT_BYTES", 0)  # as of groups of gigabytes: few ranges, columns in pieces
    monkeypatch.setattr(parquet_rows, "_LARGE_GROUP_RANGES", 2)
    assert [p.rows for p in ranges_of(str(path), 3)] == [10, 10, 10, 10, 5, 5]
    assert [r["text"] for r in records_of(str(path)) if r] == [str(i) for i in range(50)]


def test_a_row_of_parquet_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    binary = pa.array([b"a", b"\xff\xfe", b"c"])
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    rows = rows_of(str(tmp_path))
    assert [r.record and r.record["text"] for r in rows] == ["a", None, "c"]
    assert "UnicodeDecodeError" in rows[1].parse_error


def test_two_columns_of_one_name_and_a_damaged_footer_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet has several columns of one name, \['text'\]"):
        ranges_of(str(tmp_path))
    write(tmp_path, {"a.parquet": b"PAR1 and nothing more PAR1"})
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read.*replace it"):
        ranges_of(str(tmp_path))


def test_numbers_of_classes_become_the_names_that_datasets_writes(tmp_path: Path) -> None:
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    features = {
        "label": label,
        "many": {"feature": label, "_type": "Sequence"},
        "listed": {"feature": label, "_type": "List"},
        "inner": {"box": {"dtype": "int64", "_type": "Value"}, "class": label},
        "text": {"dtype": "string", "_type": "Value"},
    }
    inner = {"box": 1, "class": 1}
    rows = [{"label": n, "many": [0, 1], "listed": [1], "inner": inner, "text": "x"} for n in (1, 0, -1, None, 2, -2)]
    table = pa.Table.from_pylist(rows)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    found = [row for part in ranges_of(str(tmp_path)) for row in sources.read(part)]
    assert [row.record and row.record["label"] for row in found] == ["dog", "cat", None, None, None, None]
    assert found[0].record == {
        "label": "dog", "many": ["cat", "dog"], "listed": ["dog"], "inner": {"box": 1, "class": "dog"}, "text": "x"
    }  # fmt: skip
    unnamed = [f"label is {number}; the schema has 2 classes" for number in (2, -2)]
    assert [row.parse_error for row in found] == ["", "", "", "", *unnamed]


MEMBERS = [
    (f"{i:06}.{extension}", data)
    for i in range(10)
    for extension, data in {
        "0.jpg": b"\xff\xd8 %d" % i, "10.jpg": b"ten", "2.JPG": b"two", "json": b'{"width": %d, "x": NaN}' % i,
        "txt": f"ein Fuß {i}\n".encode(), "cls": b"%d" % i,
    }.items()
]  # fmt: skip
"""Samples as img2dataset and webdataset's TarWriter write them."""


def _arranged(order: str) -> list[tuple[str, bytes]]:
    members = list(MEMBERS)
    if order == "by extension":
        members.sort(key=lambda member: (member[0].partition(".")[2], member[0]))
    elif order == "shuffled":
        random.Random(3).shuffle(members)
    return members


@pytest.mark.parametrize("held", [64 << 20, 0])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.zst"])
@pytest.mark.parametrize("order", ["side by side", "by extension", "shuffled"])
def test_members_of_a_key_meet_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, suffix: str, held: int
) -> None:
    monkeypatch.setattr(tar_rows, "_HELD_BYTES", held)
    monkeypatch.setattr(tar_rows, "COMPRESSED_RANGE_ROWS", 16)
    data = tar(_arranged(order))
    data = {"tar": data, "tar.gz": gzip.compress(data), "tar.zst": pa.Codec("zstd").compress(data, asbytes=True)}[
        suffix
    ]
    rows = rows_of(write(tmp_path, {f"00000.{suffix}": data}), 4)
    assert [row.parse_error for row in rows] == [""] * 10
    records = sorted((row.record for row in rows if row.record), key=lambda record: record["__key__"])
    for i, record in enumerate(records):
        names = ["__key__", "0.jpg", "2.jpg", "10.jpg", "cls", "json", "txt"]
        assert list(record) == names, "images in the order of their numbers, whatever the order in the archive"
        assert (record["__key__"], record["0.jpg"], record["cls"]) == (f"{i:06}", b"\xff\xd8 %d" % i, i)
        assert record["json"]["width"] == i and record["txt"] == f"ein Fuß {i}\n"


def test_a_range_of_a_tar_is_read_alone_and_pickles_small(tmp_path: Path) -> None:
    parts = ranges_of(write(tmp_path, {"a.tar": tar(MEMBERS)}), 4)
    assert [part.rows for part in parts] == [4, 4, 2] and all(part.end for part in parts)
    assert [row.record["cls"] for row in sources.read(parts[1]) if row.record] == [4, 5, 6, 7]
    assert len(pickle.dumps(parts[1])) < 600
    [first, *_] = sources.read(parts[1], ["txt"])
    assert first.record == {"__key__": "000004", "txt": "ein Fuß 4\n"}, "other members are not read"


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_every_style_of_tar(tmp_path: Path, style: int) -> None:
    folder = "a folder/" * (8 if style == tarfile.USTAR_FORMAT else 40)
    names = [f"./{folder}x", f"{folder}ü"]
    data = tar([(folder, None), *((f"{name}.txt", b"t") for name in names)], style)
    rows = records_of(write(tmp_path, {"a.tar": data}), 1)
    assert [row and row["__key__"] for row in rows] == [f"{folder}x", f"{folder}ü"]


def test_what_a_tar_holds_besides_samples_is_said(tmp_path: Path) -> None:
    members = [
        ("d/", None), ("d/a.txt", b"1"), ("README", b"x"), ("d/.hidden", b"x"), ("d/._a.txt", b"AppleDouble"),
        ("d/b.txt", b"2"), ("d/a.TXT", b"again"), ("d/c.json", b"{"), ("d/e.txt", b"\xff"),
        ("d/f.json", b'{"a":1,"a":2}'),
    ]  # fmt: skip
    source = write(tmp_path, {"a.tar": tar(members)})
    rows = rows_of(source)
    errors = {row.name.rpartition("#")[2]: row.parse_error for row in rows if row.record is None}
    assert [row.record for row in rows if row.record] == [{"__key__": "d/b", "txt": "2"}]
    assert "'d/a.txt' stands 2 times" in errors["0"]
    assert "'README' belongs to no key" in errors["1"] and "'d/.hidden' belongs to no key" in errors["2"]
    assert "d/c.json is not JSON" in errors["4"] and "d/e.txt is not UTF-8" in errors["5"]
    assert "d/f.json is not JSON: 'a' stands twice" in errors["6"] and len(rows) == 7
    whole = ranges_of(source)[0]
    assert sources.schema_of(whole).columns == ("__key__", "txt", "json")


def test_a_link_in_a_tar_is_a_bad_row_and_not_a_lost_one(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("one")
    (tmp_path / "2.txt").hardlink_to(tmp_path / "1.txt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "1.txt", "1.txt")
        archive.add(tmp_path / "2.txt", "2.txt")
    rows = rows_of(str(tmp_path / "a.tar"))
    assert rows[0].record == {"__key__": "1", "txt": "one"} and "--hard-dereference" in rows[1].parse_error


def test_joined_archives_are_read_to_the_end_and_damaged_ones_refused(tmp_path: Path) -> None:
    data = tar(MEMBERS[:12])
    joined = write(tmp_path, {"a.tar": data + tar([("z.txt", b"last")])})
    assert [r["__key__"] for r in records_of(joined) if r] == ["000000", "000001", "z"]
    damaged = bytearray(data)
    damaged[512 * 6 + 3] ^= 1
    for wrong, why in (
        (bytes(damaged), "byte 3072 is damaged"),
        (data[: 512 * 5 + 2], "goes on after the end"),
        (b"", "empty"),
    ):
        with pytest.raises(ConfigError, match=rf"a\.tar cannot be read.*{why}"):
            ranges_of(write(tmp_path, {"a.tar": wrong}))


def test_a_lance_dataset_is_read_at_the_version_that_was_planned(tmp_path: Path) -> None:
    place = str(tmp_path / "a.lance")
    table = pa.table({"id": list(range(100)), "text": [f"t{i}" for i in range(100)], "bytes": [b"x"] * 100})
    lance.write_dataset(table, place, max_rows_per_file=30)
    lance.dataset(place).delete("id % 10 = 3")
    parts = ranges_of(str(tmp_path), 20)
    assert [part.rows for part in parts] == [20, 7, 20, 7, 20, 7, 9]
    lance.write_dataset(table.slice(0, 1), place, mode="append")
    read = [row.record for part in parts for row in sources.read(part, ["id", "text"])]
    assert read == [{"id": i, "text": f"t{i}"} for i in range(100) if i % 10 != 3]
    assert len(rows_of(place)) == 91
    for data in (tmp_path / "a.lance" / "data").iterdir():
        data.write_bytes(data.read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"a\.lance cannot be read"):
        rows_of(place)


@pytest.mark.parametrize("version", ["2.0", "2.1", "2.2"])
def test_blobs_of_lance_are_bytes(tmp_path: Path, version: str) -> None:
    blob = pa.field("image", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    images = [b"a", None, b"", b"d" * 100_000, b"e"]
    table = pa.table([pa.array(images, pa.large_binary()), list(range(5))], pa.schema([blob, ("id", pa.int64())]))
    lance.write_dataset(table, str(tmp_path / "b.lance"), data_storage_version=version)
    lance.dataset(str(tmp_path / "b.lance")).delete("id = 1")
    found = records_of(str(tmp_path), 2)
    assert [(r["id"], r["image"]) for r in found if r] == [(i, images[i]) for i in (0, 2, 3, 4)]


def test_a_lance_dataset_on_s3(s3_env) -> None:  # type: ignore[no-untyped-def]
    place = f"s3://{s3_env.bucket}/lance/b.lance"
    lance.write_dataset(pa.table({"id": list(range(10))}), place, storage_options={"allow_http": "true"})
    assert [r and r["id"] for r in records_of(f"s3://{s3_env.bucket}/lance", 4)] == list(range(10))


def test_a_folder_of_images_gives_one_row_an_image(tmp_path: Path) -> None:
    files = {
        f"train/{label}/{i}.{suffix}": bytes([i]) for label in ("cat", "dog") for i, suffix in enumerate(("jpg", "PNG"))
    }
    place = write(tmp_path / "a", {**files, "train/cat/._0.jpg": b"", "README.md": b"", "top.webp": b"x"})
    rows = rows_of(place, 1)
    assert [(row.folder, row.record) for row in rows] == [
        ("", {"file_name": "top.webp"}),
        ("train/cat", {"file_name": "0.jpg", "label": "cat"}),
        ("train/cat", {"file_name": "1.PNG", "label": "cat"}),
        ("train/dog", {"file_name": "0.jpg", "label": "dog"}),
        ("train/dog", {"file_name": "1.PNG", "label": "dog"}),
    ]
    assert len({row.name for row in rows}) == 5
    parts = ranges_of(place)
    (tmp_path / "a" / "train" / "dog" / "0.jpg").write_bytes(b"another")
    image_rows._listed.cache_clear()  # another process
    with pytest.raises(ConfigError, match="has changed since this job began"):
        list(sources.read(parts[-1]))


def test_a_range_of_a_folder_of_images_on_s3_lists_its_pages_only(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Names in the order of their bytes, with folders and other files between them."""
    names = sorted([f"{i:03d}.jpg" for i in range(40)] + ["é.jpg", "z b.png", "日本.webp", "Z.gif"])
    others = {f"train/{i:03d}.txt": b"" for i in range(0, 40, 3)} | {"train/011.d/1.jpg": b"1"}
    write(tmp_path / "a", {**{f"train/{name}": name.encode() for name in names}, **others})
    s3fs.S3FileSystem().put(f"{tmp_path}/a/", f"{s3_env.bucket}/a-folder-of-images/", recursive=True)
    monkeypatch.setattr(listing, "_BATCH", 5)
    ranges = [part for part in ranges_of(f"s3://{s3_env.bucket}/a-folder-of-images", 6) if part.file == "train/*"]
    image_rows._listed.cache_clear()
    pages: list[str] = []
    call = s3fs.S3FileSystem.call_s3

    def counted(fs: s3fs.S3FileSystem, method: str, *args: Any, **kwargs: Any) -> Any:
        pages.append(method)
        return call(fs, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", counted)
    found, asked = [], []
    for part in ranges:
        pages.clear()
        found.append([row["file_name"] for row, _ in image_rows.ImageRows().read(part, None) if row])
        asked.append(len(pages))
    assert found == [names[i : i + 6] for i in range(0, len(names), 6)]
    assert max(asked) <= 4, "6 images, 2 other files and a folder between them, 5 to a page"
