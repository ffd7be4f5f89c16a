"""``crem prepare`` itself over one bucket with many layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.config import load_config
from pipelines.corpus.prepare import prepare
from tests.pipelines.conftest import encoded, random_image, table
from tests.pipelines.formats.test_tables import tar

PNG = {number: encoded(random_image(number)) for number in range(9)}


def write(path: Path, data: bytes | list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(data), path)
    else:
        path.write_text("\n".join(map(json.dumps, data)) if path.suffix == ".jsonl" else json.dumps(data))


def many_layouts(folder: Path) -> Path:
    mmeb = [
        {"qry": "<|image_1|>\nName it.", "qry_image_path": "images/N/1.png", "pos_text": "box", "pos_image_path": ""},
        {"qry": "<|image_1|>\n", "qry_image_path": "", "pos_text": "box", "pos_image_path": ""},
    ]
    write(folder / "mmeb" / "N24News" / "original-00000-of-00001.parquet", mmeb)
    write(folder / "images" / "N" / "1.png", PNG[1])
    said = ["<image>\nWhat is it?", "A box.", "Compare it to <image> here.", "It is redder."]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    llava = [
        {"id": "1", "image": ["1.png", "2.png"], "conversations": turns},
        {"id": "2", "image": "1.png", "conversations": turns},
    ]
    write(folder / "llava" / "llava.json", llava)
    write(folder / "llava" / "1.png", PNG[2])
    write(folder / "llava" / "2.png", PNG[3])
    write(folder / "birds" / "test" / "metadata.jsonl", [{"file_name": "1.png", "text": "a wren", "mood": "good"}])
    write(folder / "birds" / "test" / "1.png", PNG[4])
    talks = [{"file_name": "1.png", "conversations": [*turns[:1], {"from": "gpt", "value": "A talk."}]}]
    write(folder / "talks" / "metadata.jsonl", talks)
    write(folder / "talks" / "1.png", PNG[8])
    (folder / "web").mkdir()
    tar(folder / "web" / "00000.tar", {"b.png": PNG[5], "a.txt": b"an a", "b.txt": b"a b", "a.png": PNG[6]})
    write(folder / "hub" / "train.parquet", [{"image": {"bytes": PNG[7], "path": "x.png"}, "caption": "seven"}])
    write(folder / "ours" / "a.jsonl", [{"key": "k", "query_text": "what is <image>?", "target_text": "a tag"}])
    return folder


@pytest.mark.ray
def test_many_layouts_in_one_run(tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    made = prepare(str(many_layouts(tmp_path / "bucket")), str(out), load_config("micro"))
    assert made.rows_in == made.rows_out + made.rejected == 11
    assert made.by_reason == {"empty_query": 1, "image_count": 1}
    rows = {
        (row["answer"] if row["answer"] == "A talk." else row["question"] or row["target"]["text"]): row
        for row in table(out / "rows")
    }
    assert len(rows) == made.rows_out == 9
    sides = {name: (row["query"]["text"], len(row["query"]["images"]), row["split"]) for name, row in rows.items()}
    history = "user: What is it?\nassistant: A box.\n"
    assert sides == {
        "box": ("Name it.", 1, "train"),
        "What is it?": (None, 1, "train"),
        "Compare it to image 2 here.": (history + "Compare it to  here.", 2, "train"),
        "a wren": (None, 1, "test"),
        "an a": (None, 1, "train"),
        "a b": (None, 1, "train"),
        "seven": (None, 1, "train"),
        "A talk.": (None, 1, "train"),
        "a tag": ("what is <image>?", 0, "train"),
    }
    assert rows["Compare it to image 2 here."]["query"]["image_at"] == [0, len(history) + len("Compare it to ")]
    assert (rows["box"]["source"], rows["box"]["task"]) == ("N24News", "N24News")
    assert made.images == 8
    images = {image["id"]: image["uri"] for image in table(out / "images")}
    assert images[rows["a wren"]["query"]["images"][0]] == "birds/test/1.png"
    assert "column 'mood' is not known" in caplog.text
