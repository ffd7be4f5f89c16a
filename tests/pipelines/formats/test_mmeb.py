"""MMEB as TIGER-Lab publishes it: Parquet with one folder for each sub-dataset."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.config import PrepareConfig
from crem.errors import ConfigError
from pipelines.formats.detection import detect_source
from pipelines.formats.raw_rows import RawItem, check_row
from pipelines.sources import sources
from tests.pipelines.formats.reading import item_of, reason_of, row_of, rows_of

IMAGENET = {
    "qry": "<|image_1|>\nRepresent the given image for classification\n",
    "qry_image_path": "images/ImageNet_1K/Train/n02007558_10003.JPEG",
    "pos_text": "flamingo",
    "pos_image_path": "",
}
VISDIAL = {
    "qry": "Represent the given dialogue about an image, which is used for image retrieval: Q:is it a box\nA:yes\n",
    "qry_image_path": "",
    "pos_text": "<|image_1|>\nRepresent the given image",
    "pos_image_path": "images/VisDial/Train/1.jpg",
    "neg_text": "<|image_1|>",
    "neg_image_path": "images/VisDial/Train/2.jpg",
}
WEBQA = {
    "qry": "<|image_1|>\nFind a Wikipedia image that answers this question: What is it?",
    "qry_image_path": "",
    "pos_text": "<|image_1|>\nRepresent the given Wikipedia image with related text information: A box.",
    "pos_image_path": "images/WebQA/Train/1.jpg",
}


def test_training_pairs() -> None:
    file = "ImageNet_1K/original-00000-of-00001.parquet"
    name, (row,) = rows_of(IMAGENET, file)
    assert (name, row.source, row.task, row.split) == ("mmeb-train", "ImageNet_1K", "ImageNet_1K", "train")
    assert row.query == RawItem("Represent the given image for classification", (IMAGENET["qry_image_path"],), None)
    assert (row.target, row.negatives) == (RawItem("flamingo", (), None), ())
    assert (row.question, row.answer) == (None, None)
    row = row_of(VISDIAL)
    assert row.query.images == ()
    assert row.target == RawItem("Represent the given image", ("images/VisDial/Train/1.jpg",), None)
    assert row.negatives == (RawItem(None, ("images/VisDial/Train/2.jpg",), None),)
    assert row.source == "corpus"


def test_a_mark_without_an_image_goes() -> None:
    row = row_of(WEBQA)
    assert row.query == RawItem("Find a Wikipedia image that answers this question: What is it?", (), None)
    assert reason_of({**IMAGENET, "qry": "<|image_1|> <|image_2|> both"}) == "image_count"


def test_rows_that_vlm2vec_skips_are_rejected_with_a_reason() -> None:
    for record, reason in (
        ({**IMAGENET, "qry": "", "qry_image_path": ""}, "empty_query"),
        ({**IMAGENET, "qry": "<|image_1|>\n", "qry_image_path": ""}, "empty_query"),
        ({**IMAGENET, "pos_text": " "}, "empty_target"),
    ):
        with pytest.raises(Exception, match=reason):
            check_row(row_of(record), max_text_chars=1000, max_images=4)


def test_evaluation_rows_have_the_answer_first() -> None:
    record = {
        "qry_text": "<|image_1|>\nRepresent the given image with the following question: What?\n",
        "qry_img_path": "A-OKVQA/1.jpg",
        "tgt_text": ["a box", "a ball", "a cat"],
        "tgt_img_path": ["", "", ""],
    }
    name, (row,) = rows_of(record, "A-OKVQA/test-00000-of-00001.parquet")
    assert (name, row.source, row.split) == ("mmeb-eval", "A-OKVQA", "test")
    assert row.query.text == "Represent the given image with the following question: What?"
    assert row.target.text == "a box"
    assert [negative.text for negative in row.negatives] == ["a ball", "a cat"]
    assert reason_of({**record, "tgt_text": [], "tgt_img_path": []}) == "empty_target"
    assert reason_of({**record, "tgt_img_path": ["", ""]}) == "bad_row"


def test_image_tasks_of_version_two_have_instructions_of_their_own() -> None:
    record = {
        "qry_inst": "<|image_1|> Select the portion of the image that isolates the object labeled as",
        "qry_text": '"a cup"',
        "qry_img_path": "MSCOCO/1.jpg",
        "tgt_inst": "<|image_1|>\nRepresent the given cropped image of the object",
        "tgt_text": [""],
        "tgt_img_path": ["MSCOCO/1_0.jpg", "MSCOCO/1_1.jpg"],
    }
    row = row_of(record, "MSCOCO/test-00000-of-00001.parquet")
    assert row.query == RawItem(
        '"a cup"', ("MSCOCO/1.jpg",), "Select the portion of the image that isolates the object labeled as"
    )
    instruction = "Represent the given cropped image of the object"
    assert row.target == RawItem(None, ("MSCOCO/1_0.jpg",), instruction)
    assert row.negatives == (RawItem(None, ("MSCOCO/1_1.jpg",), instruction),)
    text = {**record, "tgt_inst": None, "tgt_text": ["a", "b"], "tgt_img_path": None}
    assert [row_of(text).target.text, row_of(text).negatives[0].text] == ["a", "b"]


def test_one_side_is_embedded() -> None:
    with pytest.raises(ConfigError, match=r"training pairs of MMEB.*embed\.side=query"):
        item_of(VISDIAL)
    assert item_of(VISDIAL, side="target").images == ("images/VisDial/Train/1.jpg",)
    assert item_of(VISDIAL, side="query").images == ()


def test_the_name_of_the_other_release_is_refused(tmp_path: Path) -> None:
    renamed = {k: v for k, v in IMAGENET.items() if k != "qry_image_path"} | {"qry_img_path": "a.jpg"}
    folder = tmp_path / "ImageNet_1K"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([renamed]), folder / "original-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="'qry_img_path'.*did you mean 'qry_image_path'"):
        detect_source(sources.find(str(folder)), PrepareConfig(), section="prepare")
