"""``crem prepare`` with duplicates, an evaluation set and languages: what is left out is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from crem.config import load_config
from crem.errors import ConfigError
from pipelines.corpus.prepare import prepare
from pipelines.tables.manifest import PrepareManifest, table_parts
from pipelines.tables.storage import Folder
from tests.pipelines.conftest import write_rows
from tests.pipelines.duplicates.planted import COPIES, photo, png

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    parts = [pq.read_table(folder / table / name) for name in table_parts(Folder.at(folder), table)]
    return [row for part in parts for row in part.to_pylist()]


def prepared(source: Path, out: Path, *settings: str) -> PrepareManifest:
    return prepare(str(source), str(out), load_config("micro-base", list(settings)))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A pair and copies of it, a row of the evaluation set, a German one, and a repeated key."""
    folder = tmp_path / "corpus"
    images = {
        "a.png": png(photo(1)),
        "copy.jpg": COPIES["q50"](photo(1)),
        "b.png": png(photo(2)),
        "c.png": png(photo(3)),
    }
    (folder / "images").mkdir(parents=True)
    for name, data in images.items():
        (folder / "images" / name).write_bytes(data)
    found = [
        {"key": "first", "query_images": ["a.png"], "target_text": "a picture"},
        {"key": "same", "query_images": ["a.png"], "target_text": "a picture"},
        {"key": "copy", "query_images": ["copy.jpg"], "target_text": "A picture."},
        {"key": "tested", "query_images": ["b.png"], "target_text": "seen before"},
        {
            "key": "german",
            "query_text": "Ein kleines Boot liegt neben der alten Steinbrücke.",
            "target_text": "ein Boot",
        },
        {"key": "other", "query_images": ["c.png"], "target_text": "another"},
        {"key": "other", "query_images": ["c.png"], "target_text": "another"},
        {"key": "broken", "query_images": ["gone.png"], "target_text": "t"},
    ]
    write_rows(folder / "rows" / "a.jsonl", found)
    return folder


def test_what_is_left_out_is_accounted_for(corpus: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation"
    (evaluation / "images").mkdir(parents=True)
    (evaluation / "images" / "x.jpg").write_bytes(COPIES["bright"](photo(2)))
    write_rows(
        evaluation / "rows" / "a.jsonl", [{"key": "e", "split": "test", "query_images": ["x.jpg"], "target_text": "x"}]
    )
    prepared(evaluation, tmp_path / "evaluated")

    out = tmp_path / "out"
    settings = [
        "prepare.near_duplicates=drop",
        f"prepare.contamination=['{tmp_path}/evaluated']",
        "prepare.languages=[en]",
    ]
    manifest = prepared(corpus, out, *settings)
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected, manifest.filtered) == (8, 2, 2, 4)
    left_out = {row["key"]: (row["stage"], row["reason"]) for row in rows(out, "rejected")}
    assert left_out == {
        "same": ("duplicates", "exact_duplicate"),
        "copy": ("duplicates", "near_duplicate"),
        "tested": ("contamination", "evaluation_image"),
        "german": ("language", "other_language"),
        "other": ("ids", "duplicate_id"),
        "broken": ("read", "image_missing"),
    }
    assert [row["key"] for row in rows(out, "rows")] == ["first", "other"]
    assert len(rows(out, "images")) == manifest.images == 2, "images that only these rows name go with them"
    details = {row["key"]: row["detail"] for row in rows(out, "rejected")}
    assert (
        details["copy"] == "nearly the same as row 'corpus/first'" and str(tmp_path / "evaluated") in details["tested"]
    )
    clusters = pq.read_table(out / f"clusters-{manifest.version}.parquet").to_pylist()
    assert [(c["kind"], c["size"], c["left_out"]) for c in clusters] == [("rows", 3, 2), ("images", 2, 0)]
    assert clusters[0]["names"] == ["corpus/first", "corpus/same", "corpus/copy"]


def test_a_report_leaves_all_rows_and_its_clusters_go_with_their_version(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepared(corpus, out)
    assert (first.rows_out, first.filtered) == (6, 0)
    (cluster,) = pq.read_table(out / f"clusters-{first.version}.parquet").to_pylist()
    assert (cluster["size"], cluster["left_out"], cluster["reason"]) == (2, 0, "exact_duplicate")
    second = prepared(corpus, out, "prepare.exact_duplicates=drop")
    assert (second.rows_out, second.filtered) == (5, 1)
    assert [path.name for path in out.glob("clusters-*")] == [f"clusters-{second.version}.parquet"]


def test_another_evaluation_set_at_the_same_place_is_another_job(corpus: Path, tmp_path: Path) -> None:
    evaluated, out = tmp_path / "evaluated", tmp_path / "out"
    setting = f"prepare.contamination=['{evaluated}']"
    with pytest.raises(ConfigError, match="holds no completed prepared tables"):
        prepared(corpus, out, setting)
    assert not out.exists(), "refused before anything is written"
    counts = []
    for key, text in (("e", "nothing of it"), ("f", "Ein kleines Boot liegt neben der alten Steinbrücke")):
        write_rows(
            tmp_path / "e" / "rows" / "a.jsonl", [{"key": key, "split": "test", "query_text": text, "target_text": "x"}]
        )
        prepared(tmp_path / "e", evaluated)
        counts.append(prepared(corpus, out, setting).filtered)
    assert counts == [0, 1]
