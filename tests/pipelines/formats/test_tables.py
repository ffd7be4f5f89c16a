"""Image folders, WebDataset, COCO, addresses of images, and tables under the names that many use."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.config import EmbedConfig, PrepareConfig
from crem.errors import ConfigError
from pipelines.formats.detection import detect_source
from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.formats.record_reader import RecordReader
from pipelines.formats.table import CAPTIONS, IMAGES
from pipelines.sources import sources
from tests.pipelines.conftest import encoded, random_image
from tests.pipelines.formats.reading import item_of, reader_of, reason_of, row_of, rows_of

JPEG = encoded(random_image(1), "JPEG")
PNG = encoded(random_image(2))


def test_an_image_folder_with_captions_labels_or_questions() -> None:
    name, (row,) = rows_of({"file_name": "0001.png", "text": "a box"}, "train/metadata.jsonl")
    assert (name, row.query, row.target.text, row.split) == (
        *("imagefolder", RawItem(None, ("train/0001.png",), None), "a box", "train"),
    )
    assert row_of({"file_name": "cat/1.png", "label": "cat"}, "test/metadata.csv").split == "test"
    row = row_of({"file_name": "1.png", "question": "<image>\nWhat?", "answer": "a box"}, "metadata.jsonl")
    assert (row.query.images, row.question, row.answer, row.target.is_empty) == (("1.png",), "What?", "a box", True)
    assert row_of({"file_names": ["a.png", "b.png"], "caption": "two"}).query.images == ("a.png", "b.png")
    assert row_of({"file_name": "s3://b/1.png", "text": "x"}, "d/metadata.jsonl").query.images == ("s3://b/1.png",)
    assert reason_of({"file_name": None, "text": "x"}) == "empty_query"


def test_pairs_of_files() -> None:
    record = {"input_file_name": "1.png", "output_file_name": "2.png", "prompt": "make it red"}
    row = row_of(record, "data/metadata.jsonl")
    assert row.query == RawItem("make it red", ("data/1.png",), None)
    assert row.target == RawItem(None, ("data/2.png",), None)
    assert row_of({"file_name": "1.png", "text": "a", "negative_file_name": "3.png"}).negatives[0].images == ("3.png",)


def test_captions_of_coco() -> None:
    record = {
        "image_id": 391895,
        "id": 770337,
        "caption": "A man on a bike.",
        "file_name": "000000391895.jpg",
        "license": 3,
        "coco_url": "http://x/391895.jpg",
        "flickr_url": "http://y",
        "height": 360,
        "width": 640,
        "date_captured": "2013-11-14 11:18:45",
    }
    row = row_of(record, "annotations/captions_val2017.json")
    assert row.query.images == ("val2017/000000391895.jpg",)
    assert (row.target.text, row.split) == ("A man on a bike.", "validation")


@pytest.mark.parametrize(
    ("record", "images", "caption"),
    [
        ({"caption": "a box", "url": "https://x.org/1.jpg"}, ("https://x.org/1.jpg",), "a box"),  # CC3M
        (
            {
                "SAMPLE_ID": 1.0,
                "URL": "https://x.org/1.jpg",
                "TEXT": "a box",
                "HEIGHT": 1,
                "WIDTH": 1,
                "LICENSE": "?",
                "NSFW": "UNLIKELY",
                "similarity": 0.3,
                "hash": -1,
                "punsafe": 0.1,
                "pwatermark": 0.1,
            },
            ("https://x.org/1.jpg",),
            "a box",
        ),  # LAION
        (
            {
                "jpg": JPEG,
                "url": "https://x.org/1.jpg",
                "caption": "a box",
                "key": "0000",
                "status": "success",
                "error_message": None,
                "width": 1,
                "height": 1,
                "original_width": 2,
                "original_height": 2,
                "exif": "{}",
                "sha256": "0a",
            },
            (JPEG,),
            "a box",
        ),  # img2dataset with Parquet output
        ({"image": {"bytes": PNG, "path": "1.png"}, "text": "a box"}, (PNG,), "a box"),  # datasets
        ({"image": {"bytes": None, "path": "a/1.png"}, "text": "a box"}, ("a/1.png",), "a box"),
        ({"images": [{"bytes": PNG, "path": None}] * 2, "alt_text": "two"}, (PNG, PNG), "two"),
        ({"image": JPEG, "text": "", "title": "a box"}, (JPEG,), "a box"),
        ({"Image": "1.png", "Caption": "a box"}, ("1.png",), "a box"),
        ({"uri": "s3://b/1.png", "label": "box"}, ("s3://b/1.png",), "box"),
        ({"image": "1.png", "label": None}, ("1.png",), None),
    ],
)
def test_tables_under_common_names(record: dict[str, Any], images: tuple[Any, ...], caption: str | None) -> None:
    name, (row,) = rows_of(record, "a.parquet")
    assert (name, row.query.images, row.target.text) == ("table", images, caption)


def test_several_captions_are_several_rows() -> None:
    record = {"image": PNG, "caption": ["a box", "a red box", ""], "sentids": ["1", "2", "3"], "split": "val"}
    assert [(row.key, row.target.text, row.split) for row in rows_of(record)[1]] == [
        ("k/1", "a box", "validation"),
        ("k/2", "a red box", "validation"),
    ]
    splits = [row_of({**record, "caption": "a", "split": split}).split for split in ("restval", "test", "test_x")]
    assert splits == ["train", "test", "test_x"]
    karpathy = {"filepath": "val2014", "filename": "1.jpg", "sentences": [{"raw": "a box", "tokens": ["a", "box"]}]}
    row = row_of(karpathy)
    assert (row.query.images, row.target.text) == (("val2014/1.jpg",), "a box")


def test_questions_with_the_answers_of_several_people() -> None:
    record = {"image": PNG, "question": "What?", "answers": ["box", "a box", "box"], "question_id": 1}
    row = row_of(record)
    assert (row.question, row.answer) == ("What?", "box")
    answers = [{"answer": "yes", "answer_id": 1}, {"answer": "no", "answer_id": 2}, {"answer": "no", "answer_id": 3}]
    assert row_of({**record, "answers": answers}).answer == "no"
    assert row_of({**record, "answers": answers, "multiple_choice_answer": "yes"}).answer == "yes"


def test_a_class_is_its_name_or_its_number() -> None:
    def target(label: Any) -> str | None:
        return row_of({"image": PNG, "label": label}).target.text

    assert [target("dog"), target(["cat", "dog"]), target(None), target(7)] == ["dog", "cat, dog", None, "7"]


def test_class_names_come_from_the_schema_of_the_file(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.Table.from_pylist([{"image": {"bytes": PNG, "path": "1.png"}, "label": 1}])
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    (row,) = read(tmp_path)
    assert (row.query.images, row.target.text, row.split) == ((PNG,), "dog", "test")


def test_a_column_that_is_nearly_a_caption_is_refused() -> None:
    with pytest.raises(Exception, match="'captoin'.*did you mean 'caption'"):
        rows_of({"image": PNG, "captoin": "a box"})
    assert rows_of({"image": PNG, "captoin": "a box"}, columns={"captoin": "caption"})[1][0].target.text == "a box"
    reader = reader_of([{"image": PNG, "mood": 1, "text": "a"}])
    assert reader.detection.warnings() == ["column 'mood' is not known to table and is not read"]


def test_of_columns_for_one_thing_the_first_is_used_and_the_others_are_spare() -> None:
    def uses(**record: Any) -> dict[str, str]:
        return {c.name: c.use for c in reader_of([record]).detection.layouts[0].columns}

    found = reader_of([{"image": "a.jpg", "label": "l", "description": "d", "Caption": "c"}]).detection.layouts[0]
    assert {c.name: c.use for c in found.columns} == {
        "image": "used", "label": "spare", "description": "spare", "Caption": "used"
    }  # fmt: skip
    assert "label; read where 'Caption' is empty" in [c.meaning for c in found.columns]
    assert uses(file_name="a.jpg", url="b.jpg", text="t") == {"file_name": "used", "url": "spare", "text": "used"}
    assert uses(image="a.jpg", Caption="c", caption="d") == {"image": "used", "Caption": "used", "caption": "spare"}
    assert uses(conversations=[], images=["a"], image="b")["images"] == "spare"
    assert uses(messages=[], images=["a"], image="b")["image"] == "spare"
    member = {"__key__": "1", "json": {"url": "http://x/1.jpg", "caption": "c"}}
    assert uses(**member, **{"left.png": PNG})["json.url"] == "spare"
    assert uses(**member)["json.url"] == "used"


def test_items_are_image_and_text_together() -> None:
    record = {"image": PNG, "text": "a box", "id": 1}
    assert item_of(record) == RawItem("a box", (PNG,), None)
    assert item_of(record, side="query") == RawItem(None, (PNG,), None)
    assert item_of(record, side="target") == RawItem("a box", (), None)
    assert item_of({"file_name": "1.png", "text": "a box"}) == RawItem("a box", ("1.png",), None)
    assert item_of({"text": "a box"}) == RawItem("a box", (), None)
    assert item_of({"uri": "a.png"}).images == ("a.png",)
    assert item_of({"uri": "https://x.org/page", "text": "a box"}) == RawItem("a box", (), None)
    assert item_of({"uri": "https://x.org/1.jpg", "text": "a box"}).images == ("https://x.org/1.jpg",)
    assert item_of({"image": PNG, "uri": "shop/a"}).images == (PNG,)
    placed = item_of({"image": PNG, "text": "<image>\na box"})
    assert placed == RawItem("a box", (PNG,), None)


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(folder: Path, **settings: Any) -> list[RawRow]:
    """All rows of a folder."""
    corpus = sources.find(str(folder))
    reader = RecordReader(detect_source(corpus, PrepareConfig(**settings), section="prepare"), "corpus")
    rows = [row for part in sources.split(corpus, None, 2) for row in sources.read(part, None)]
    found = [made for row in rows for made in reader.rows(row)]
    assert reader.unknown.counts == {}
    return found


def test_records_of_tars() -> None:
    name, (row,) = rows_of({"__key__": "0001", "jpg": JPEG, "txt": "a box", "cls": 3}, "00000.tar")
    assert (name, row.query.images, row.target.text) == ("webdataset", (JPEG,), "a box")
    assert row_of({"__key__": "0001", "png": PNG, "cls": 3}).target.text == "3"
    several = {"__key__": "0001", "10.png": b"10", "2.png": b"2", "left.jpg": b"l", "json": {"caption": "three"}}
    row = row_of(several)
    assert (row.query.images, row.target.text) == ((b"2", b"10", b"l"), "three")
    img2dataset = {
        "caption": "a box",
        "url": "https://x.org/1.jpg",
        "key": "0001",
        "status": "success",
        "error_message": None,
        "width": 1,
        "height": 1,
        "original_width": 2,
        "original_height": 2,
        "exif": "{}",
        "sha256": "0a",
    }
    row = row_of({"__key__": "0001", "jpg": JPEG, "txt": "a box", "json": img2dataset})
    assert (row.query.images, row.target.text) == ((JPEG,), "a box")
    assert reason_of({"__key__": "0001", "txt": "a box"}) == "empty_query"
    with pytest.raises(Exception, match=r"'json\.captoin'.*did you mean 'json\.caption'"):
        rows_of({"__key__": "0001", "jpg": JPEG, "json": {"captoin": "a box"}})


def test_json_in_tars_may_be_a_text_or_a_list() -> None:
    def captions(json: Any, **more: Any) -> list[str | None]:
        return [row.target.text for row in rows_of({"__key__": "0001", "jpg": JPEG, "json": json, **more})[1]]

    assert captions("just a caption") == ["just a caption"]
    assert captions(["first", "second"]) == ["first", "second"]
    assert captions(["first", "second"], txt="first") == ["first", "second"]
    assert captions("second", txt="first") == ["first", "second"]
    assert captions([{"caption": "first"}, {"caption": "second"}]) == ["first", "second"]
    assert captions(None, txt="t") == captions([], txt="t") == captions({}, txt="t") == ["t"]
    assert captions({}, **{"meta.json": {"caption": "c"}}) == ["c"]
    assert captions({"caption": "c"}, **{"meta.json": {"caption": "d", "license": 1}}) == ["c"]
    assert captions(["b"], txt="a", **{"meta.json": {"caption": "c"}}) == ["a", "b", "c"]
    for turns in (
        [{"from": "human", "value": "<image>which?"}, {"from": "gpt", "value": "a box"}],
        [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "a box"}],
    ):
        row = row_of({"__key__": "0001", "jpg": JPEG, "json": turns})
        assert (row.query.images, row.question, row.answer) == ((JPEG,), "which?", "a box")
    for wrong in (5, [1, 2], [["a"]], [{"x": 1}], ["a", {"caption": "b"}]):
        assert reason_of({"__key__": "0001", "jpg": JPEG, "txt": "t", "json": wrong}) == "bad_row"


def test_tars_with_their_tables_beside_them_are_not_read_twice(tmp_path: Path) -> None:
    tar(tmp_path / "00000.tar", {"0.jpg": JPEG, "0.txt": b"a box"})
    pq.write_table(
        pa.Table.from_pylist([{"url": "https://x.org/1.jpg", "caption": "a box"}]), tmp_path / "00000.parquet"
    )
    with pytest.raises(ConfigError, match=r"00000\.parquet and the tar.*give .*/\*\.tar"):
        read(tmp_path)
    corpus = sources.find(f"{tmp_path}/*.tar")
    assert detect_source(corpus, PrepareConfig(), section="prepare").formats == ("webdataset",)


def test_conversations_in_tars() -> None:
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A box."}]
    row = row_of({"__key__": "1", "jpg": JPEG, "json": {"id": 1, "image": "coco/1.jpg", "conversations": conversation}})
    assert (row.query.images, row.question, row.answer) == ((JPEG,), "What?", "A box.")


def test_no_two_meanings_share_a_column() -> None:
    assert len(set(IMAGES)) == len(IMAGES)
    assert not set(IMAGES) & set(CAPTIONS)


def test_embedding_reads_image_folders(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.jpg", "text": "a box"}))
    corpus = sources.find(str(tmp_path))
    reader = RecordReader(detect_source(corpus, EmbedConfig(), section="embed"), "corpus")
    (part,) = sources.split(corpus, None, 2)
    assert [reader.item(row).images for row in sources.read(part, None)] == [("1.jpg",)]


@pytest.mark.parametrize(
    "lines",
    [
        ["a box\thttps://x.org/1.jpg", 'a "ball"\thttps://x.org/2.jpg'],
        ["https://x.org/1.jpg\ta box", 'https://x.org/2.jpg\ta "ball"'],
    ],
    ids=["CC3M", "CC12M"],
)
def test_addresses_without_a_header(tmp_path: Path, lines: list[str]) -> None:
    for start in ("", "\ufeff"):
        (tmp_path / "cc.tsv").write_text(start + "\n".join(lines), encoding="utf-8")
        rows = read(tmp_path)
        assert [(row.query.images, row.target.text) for row in rows] == [
            (("https://x.org/1.jpg",), "a box"),
            (("https://x.org/2.jpg",), 'a "ball"'),
        ]
