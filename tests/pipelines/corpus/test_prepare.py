"""``crem prepare``: every row is accounted for, every image stored once, nothing of another run survives."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from crem.checkpoint import read_model
from crem.config import RunConfig, load_config
from crem.errors import ConfigError
from crem.train.step import retrieval_of
from pipelines.corpus.corpus_place import require_outside
from pipelines.corpus.prepare import prepare
from pipelines.corpus.staging import stage
from pipelines.corpus.work_plan import Piece
from pipelines.formats.detection import detect_source
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.tables import ray_tasks, schema
from pipelines.tables.manifest import PrepareManifest, table_parts
from pipelines.tables.prepared import read_rows
from pipelines.tables.storage import Folder
from tests.pipelines.conftest import (
    JSON_ROWS,
    STORED_IMAGES,
    encoded,
    random_image,
    table,
    write_nasty_corpus,
    write_rows,
)

LIMITS = ["prepare.max_text_chars=200", "model.image.max_images_per_item=4"]


def config(rows_per_task: int = 4) -> RunConfig:
    return load_config("micro", [*LIMITS, f"prepare.rows_per_task={rows_per_task}"])


def part(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
    return rows


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nasty_corpus(tmp_path_factory.mktemp("corpora") / "nasty")


@pytest.fixture(scope="module", params=[3, 1000], ids=["many tasks", "one task"])
def prepared(
    request: pytest.FixtureRequest, nasty: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> tuple[Path, PrepareManifest]:
    out = tmp_path_factory.mktemp("prepared") / "out"
    return out, prepare(str(nasty), str(out), config(request.param))


def _without_fingerprint(key: str) -> str:
    """The key of a row that has none, without the part that depends on the bytes of its file."""
    return re.sub("^@[0-9a-f]{16}/", "", key)


@pytest.mark.ray
def test_every_row_is_accounted_for_with_its_reason(prepared: tuple[Path, PrepareManifest]) -> None:
    out, manifest = prepared
    expected = Counter(reason for _, _, reason in JSON_ROWS if reason)
    assert manifest.by_reason == dict(expected)
    assert manifest.rows_in == len(JSON_ROWS)
    assert manifest.rejected == expected.total()
    assert manifest.rows_out == len(JSON_ROWS) - expected.total()
    assert manifest.filtered == 0
    assert json.loads((out / "manifest.json").read_text()) == manifest.model_dump(mode="json")
    rejected = table(out / "rejected")
    assert sorted((_without_fingerprint(r["key"]), r["reason"]) for r in rejected) == sorted(
        (k, reason) for k, _, reason in JSON_ROWS if reason
    )
    assert [r["key"] for r in table(out / "rows")] == [key for key, _, reason in JSON_ROWS if not reason]
    assert all(r["detail"] for r in rejected)
    stages = {"bad_row": "parse", "duplicate_id": "ids", "image_corrupt": "decode", "image_missing": "read"}
    assert {r["reason"]: r["stage"] for r in rejected if r["reason"] in stages} == stages
    assert manifest.by_stage == {
        stage: {reason: count for reason, count in expected.items() if (stage, reason) in found}
        for found in [{(r["stage"], r["reason"]) for r in rejected}]
        for stage in sorted({stage for stage, _ in found})
    }


@pytest.mark.ray
def test_rows_have_the_documented_schema_and_ids(prepared: tuple[Path, PrepareManifest]) -> None:
    out, manifest = prepared
    for name, expected in (("rows", schema.ROWS), ("images", schema.IMAGES), ("rejected", schema.REJECTED)):
        for file in (out / name).glob("*.parquet"):
            assert pq.ParquetFile(file).schema_arrow.equals(expected)
    rows = {row["key"]: row for row in table(out / "rows")}
    for key, row in rows.items():
        assert row["id"] == schema.row_id("nasty", key)
        assert row["source"] == "nasty"
    assert rows["pair"]["query"]["text"] == "a"  # the first of the two rows with this key
    assert (rows["pair"]["task"], rows["pair"]["split"]) == ("nasty", "train")
    assert (rows["jpeg"]["task"], rows["jpeg"]["split"]) == ("t2i", "test_x")
    assert manifest.by_split_task == {"test_x/t2i": 1, "train/nasty": len(rows) - 1}
    assert (rows["three"]["target"], rows["three"]["question"], rows["three"]["answer"]) == (None, "how many?", "3")
    assert rows["numbers"]["query"] == {"text": "5", "instruction": None, "images": [], "image_at": []}
    assert rows["numbers"]["target"]["text"] == "2.5"
    assert [n["text"] for n in rows["negatives"]["negatives"]] == ["n"]
    assert rows["blank target"]["target"] is None


@pytest.mark.ray
def test_each_image_is_stored_once_and_every_reference_resolves(prepared: tuple[Path, PrepareManifest]) -> None:
    out, manifest = prepared
    images = table(out / "images")
    assert manifest.images == len(images) == len({i["id"] for i in images}) == STORED_IMAGES
    rows = {row["key"]: row for row in table(out / "rows")}
    referenced = {i for r in rows.values() for side in (r["query"], r["target"]) if side for i in side["images"]}
    assert referenced == {i["id"] for i in images}
    assert rows["pair"]["target"]["images"] == rows["copy"]["query"]["images"]
    first, second, third = rows["three"]["query"]["images"]
    assert first == third != second
    by_id = {i["id"]: i for i in images}
    for image in images:
        assert image["id"] == schema.content_id(image["bytes"])
        with Image.open(io.BytesIO(image["bytes"])) as decoded:
            assert decoded.size == (image["width"], image["height"])
            assert decoded.mode == "RGB"
    stored = by_id[rows["pair"]["target"]["images"][0]]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored["bytes"]))), np.asarray(random_image(1)))
    clear = by_id[rows["clear"]["query"]["images"][0]]
    assert Image.open(io.BytesIO(clear["bytes"])).getpixel((0, 0)) == (255, 255, 255)
    assert (by_id[rows["dot"]["query"]["images"][0]]["width"], stored["uri"]) == (1, "good_a.png")


@pytest.mark.ray
def test_parquet_jsonl_and_gzip_of_the_same_rows_agree(tmp_path: Path, local_ray: None) -> None:
    rows = [{"key": f"k{i}", "query_text": f"q{i}", "target_text": "t", "split": None} for i in range(23)]
    results = []
    for name in ("rows/r.parquet", "r.jsonl", "rows/r.jsonl.gz"):
        corpus = tmp_path / name.replace("/", "_").replace(".", "_") / "same"
        write_rows(corpus / name, rows)
        manifest = prepare(str(corpus), str(corpus.parent / "out"), config(5))
        assert (manifest.rows_in, manifest.rows_out, manifest.images) == (23, 23, 0)
        results.append(table(corpus.parent / "out" / "rows"))
    assert results[0] == results[1] == results[2]


@pytest.mark.ray
def test_images_from_zip_bytes_data_urls_and_absolute_paths(tmp_path: Path, local_ray: None) -> None:
    corpus = tmp_path / "corpus"
    outside = tmp_path / "elsewhere.png"
    outside.write_bytes(encoded(random_image(7)))
    inline = encoded(random_image(8))
    rows: list[dict[str, Any]] = [
        {"key": "zip", "query_images": ["in.png"], "target_text": "t"},
        {"key": "path", "query_images": [str(outside)], "target_text": "t"},
        {"key": "file uri", "query_images": [f"file://{outside}"], "target_text": "t"},
        {"key": "not in zip", "query_images": ["out.png"], "target_text": "t"},
        {"key": "bomb in zip", "query_images": ["huge.png"], "target_text": "t"},
    ]
    write_rows(corpus / "rows" / "a.parquet", rows)
    write_rows(
        corpus / "rows" / "b.parquet",
        [
            {"key": "bytes", "query_images": [inline], "target_text": "t"},
            {"key": "no bytes", "query_images": [b""], "target_text": "t"},
        ],
    )
    with zipfile.ZipFile(corpus / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in.png", encoded(random_image(9)))
        archive.writestr("huge.png", bytes(2**20 + 1))
    limits = load_config("micro", ["model.image.max_source_bytes=1048576", f"prepare.image_roots=[{outside}]"])
    manifest = prepare(str(corpus), str(tmp_path / "out"), limits)
    assert manifest.by_reason == {"image_corrupt": 1, "image_missing": 1, "image_too_large": 1}
    assert (manifest.rows_in, manifest.rows_out, manifest.images) == (7, 4, 3)
    uris = {row["uri"] for row in table(tmp_path / "out" / "images")}
    assert uris == {"in.png", str(outside), None}


@pytest.mark.ray
def test_rows_without_key_are_named_by_file_and_number(tmp_path: Path, local_ray: None) -> None:
    for name in ("a.jsonl", "b.parquet"):
        write_rows(tmp_path / "c" / "rows" / name, [{"query_text": "q", "target_text": str(i)} for i in range(7)])
    prepare(str(tmp_path / "c"), str(tmp_path / "out"), config(3))
    keys = [(_without_fingerprint(row["key"]), row["target"]["text"]) for row in table(tmp_path / "out" / "rows")]
    assert keys == [(f"{name}#{i}", str(i)) for name in ("a.jsonl", "b.parquet") for i in range(7)]


@pytest.mark.ray
def test_a_second_run_replaces_the_first_and_never_mixes(tmp_path: Path, local_ray: None) -> None:
    for size, name in ((12, "big"), (2, "small")):
        rows = [{"key": f"{name}{i}", "query_text": f"q{i}", "target_text": "t"} for i in range(size)]
        write_rows(tmp_path / name / "rows.jsonl", rows)
    out = tmp_path / "out"
    prepare(str(tmp_path / "big"), str(out), config(2))
    manifest = prepare(str(tmp_path / "small"), str(out), config(2))
    assert manifest.rows_out == 2
    assert [row["key"] for row in table(out / "rows")] == ["small0", "small1"]
    names = {"_crem.json", "card.html", "images", "manifest.json", "rejected", "rows"}
    assert {p.name for p in out.iterdir()} == names | {manifest.files, manifest.statistics}


@pytest.mark.ray
def test_a_finished_run_again_does_nothing_and_says_so(
    tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    corpus, out = tmp_path / "c", tmp_path / "out"
    rows = write_rows(corpus / "rows" / "a.parquet", [{"key": "a", "query_text": "q", "target_text": "t"}])
    first = prepare(str(corpus), str(out), config())
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    (out / "_work" / first.version / "staged").mkdir(parents=True)  # as a job leaves it that is killed after its swap
    (out / "rows" / "part-000000-0123456789ab.parquet").write_bytes(b"of the version before")
    with caplog.at_level(logging.INFO):
        assert prepare(str(corpus), str(out), config()) == first
    assert "nothing to do" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == written
    again = prepare(str(corpus), str(out), config(), fresh=True)
    assert (again.plan, again.version) == (first.plan, f"{first.plan}.1")
    assert again.tables_checksum == first.tables_checksum and again.content_id == first.content_id
    assert table_parts(Folder.at(out), "rows") == [f"part-000000-{first.plan}.1.parquet"]
    assert prepare(str(corpus), str(out), config()) == again
    next((out / "images").iterdir()).unlink()
    assert prepare(str(corpus), str(out), config()).rows_out == 1, "a part is missing: it is made again"
    assert len(list((out / "images").iterdir())) == 1
    os.utime(rows, ns=(1, 1))
    assert prepare(str(corpus), str(out), config()).plan != first.plan


@pytest.mark.ray
def test_a_run_that_fails_leaves_the_good_output_as_it_was(tmp_path: Path, local_ray: None) -> None:
    corpus, out = tmp_path / "c", tmp_path / "out"
    write_rows(corpus / "rows" / "a.parquet", [{"key": "a", "query_text": "q", "target_text": "t"}])
    prepare(str(corpus), str(out), config())
    good = (out / "manifest.json").read_bytes()
    write_rows(corpus / "rows" / "a.parquet", [{"key": "b", "query_text": "q"}])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"none of the 1 rows can be used: \{'empty_target': 1\}.*rejected/part"):
            prepare(str(corpus), str(out), config())
    (corpus / "rows" / "a.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read"):
        prepare(str(corpus), str(out), config())
    assert (out / "manifest.json").read_bytes() == good
    assert [row["key"] for name in table_parts(Folder.at(out), "rows") for row in part(out / "rows" / name)] == ["a"]
    assert read_rows(str(out), split_prefix="train").table["key"].to_pylist() == ["a"]
    write_rows(corpus / "rows" / "a.parquet", [{"key": "c", "query_text": "q", "target_text": "t"}])
    assert prepare(str(corpus), str(out), config()).rows_out == 1
    assert [row["key"] for row in table(out / "rows")] == ["c"]
    assert table(out / "rejected") == []
    assert not (out / "_work").exists()


def test_no_usable_row_is_said_with_the_reasons(tmp_path: Path, local_ray: None) -> None:
    write_rows(tmp_path / "c" / "a.jsonl", [{"key": "1", "query_images": ["gone.jpg"], "target_text": "t"}])
    with pytest.raises(ConfigError, match=r"none of the 1 rows can be used: \{'image_missing': 1\}"):
        prepare(str(tmp_path / "c"), str(tmp_path / "out"), config())


def test_files_of_others_among_the_tables_stay(
    tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "c" / "a.jsonl", [{"key": "1", "query_text": "q", "target_text": "t", "\ud800x": 1}])
    out = tmp_path / "out"
    prepare(str(tmp_path / "c"), str(out), config())
    for name in ("rows/mine.parquet", "rows/notes.md", "rows/part-000007-0123456789ab.parquet"):
        (out / name).write_bytes(b"mine")
    prepare(str(tmp_path / "c"), str(out), config())
    assert "2 files that crem did not write (rows/mine.parquet, rows/notes.md)" in caplog.text
    assert (out / "rows" / "mine.parquet").read_bytes() == b"mine" and (out / "rows" / "notes.md").exists()
    assert not (out / "rows" / "part-000007-0123456789ab.parquet").exists(), "of an interrupted run"


def test_what_cannot_be_prepared_is_refused_with_the_remedy(tmp_path: Path, nasty: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="does not exist"):
        prepare(str(tmp_path / "nowhere"), out, config())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no rows.*Parquet \(\.parquet\), JSON lines"):
        prepare(str(tmp_path / "empty"), out, config())
    write_rows(tmp_path / "blank" / "rows.jsonl", [])
    with pytest.raises(ConfigError, match="not one row"):
        prepare(str(tmp_path / "blank"), out, config())
    write_rows(tmp_path / "other" / "x.parquet", [{"colour": "c"}])
    with pytest.raises(ConfigError, match=r"\['colour'\]; none of them is known"):
        prepare(str(tmp_path / "other"), out, config())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ConfigError, match=r"x\.parquet cannot be read.*replace"):
        prepare(str(tmp_path / "broken"), out, config())
    (tmp_path / "broken" / "x.parquet").unlink()
    whole = write_rows(tmp_path / "broken" / "x.jsonl.gz", [{"query_text": str(i)} for i in range(99)])
    whole.write_bytes(whole.read_bytes()[:60])
    with pytest.raises(ConfigError, match=r"x\.jsonl\.gz cannot be read.*replace"):
        prepare(str(tmp_path / "broken"), out, config())
    assert not os.path.exists(out)


def test_an_output_folder_of_something_else_is_refused_untouched(tmp_path: Path, nasty: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (precious / "rows").mkdir()
    with pytest.raises(ConfigError, match=r"holds files that crem prepare did not write \(rows, thesis\.txt\).*choose"):
        prepare(str(nasty), str(precious), config())
    assert sorted(p.name for p in precious.iterdir()) == ["rows", "thesis.txt"]
    with pytest.raises(ConfigError, match="is the corpus itself"):
        prepare(str(nasty), str(nasty), config())
    with pytest.raises(ConfigError, match="is inside the corpus"):
        prepare(str(nasty), str(nasty / "rows" / "out"), config())
    with pytest.raises(ConfigError, match="is a file"):
        prepare(str(nasty), str(precious / "thesis.txt"), config())
    assert (nasty / "images" / "good_a.png").exists()


def test_large_row_groups_are_cut_and_small_ones_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"query_text": [str(i) for i in range(50)]}), path, row_group_size=20)
    ranges = list(sources.split(sources.find(str(tmp_path)), ["query_text"], 8))
    assert [(p.first, p.rows, p.skip) for p in ranges] == [
        (0, 8, 0), (8, 8, 8), (16, 4, 16), (20, 8, 0), (28, 8, 8), (36, 4, 16), (40, 8, 0), (48, 2, 8),
    ]  # fmt: skip
    texts = [r.record["query_text"] for p in ranges for r in sources.read(p, ["query_text"]) if r.record]
    assert texts == [str(i) for i in range(50)]
    assert [p.rows for p in sources.split(sources.find(str(tmp_path)), ["query_text"], 45)] == [40, 10]
    assert [[p.rows for p in g] for g in sources.group(ranges, 16)] == [[8, 8], [4, 8], [8, 4], [8, 2]]


@pytest.mark.ray
def test_an_error_in_a_worker_arrives_as_itself(tmp_path: Path, local_ray: None) -> None:
    file = write_rows(tmp_path / "c" / "a.jsonl", [{"query_text": "q", "target_text": "t"}] * 5)
    corpus = sources.find(str(tmp_path / "c"))
    found = detect_source(corpus, config().prepare, section="prepare")
    piece = Piece(0, tuple(sources.split(corpus, ["query_text"], 5)))
    write_rows(file, [{"query_text": "q", "target_text": "t"}] * 4)  # someone else writes to it
    reader = ImageReader.of(corpus.root, config().model.image)
    work = Folder.at(tmp_path / "work")
    run = partial(stage, work=work, source="c", rows_folder="", detection=found, reader=reader, config=config())
    with pytest.raises(ConfigError, match=r"a\.jsonl has changed since this job began"), ray_tasks.remote_errors():
        list(ray_tasks.stream(run, [piece]))


@pytest.mark.ray
def test_from_object_storage_to_object_storage(tmp_path: Path, s3_env: Any) -> None:
    """As a user runs it: another process, credentials from the environment alone, for the driver and Ray's workers."""
    import s3fs

    fs = s3fs.S3FileSystem()
    corpus = write_nasty_corpus(tmp_path / "nasty")
    fs.put(str(corpus), f"{s3_env.bucket}/raw/nasty", recursive=True)
    program = (
        "from crem.config import load_config; from pipelines.corpus.prepare import prepare; "
        "config = load_config('micro', "
        f"{LIMITS}); places = 's3://{s3_env.bucket}/raw/nasty', 's3://{s3_env.bucket}/prepared';"
        "prepare(*places, config); prepare(*places, config, fresh=True)"  # the second replaces the first
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    fs.get(f"{s3_env.bucket}/prepared", str(tmp_path / "got"), recursive=True)
    manifest = json.loads((tmp_path / "got" / "manifest.json").read_text())
    assert manifest["by_reason"] == dict(Counter(reason for _, _, reason in JSON_ROWS if reason))
    assert len(table(tmp_path / "got" / "images")) == manifest["images"] == STORED_IMAGES
    assert len(table(tmp_path / "got" / "rows")) == manifest["rows_out"]
    assert not (tmp_path / "got" / "_work").exists() and not (tmp_path / "got" / "_lease.json").exists()


@pytest.mark.ray
def test_a_hard_negative_that_is_a_target_is_masked(tmp_path: Path, tiny_model_dir: str, local_ray: None) -> None:
    """From the raw row to the loss: a query's negative with the content of a target is no negative of that target."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "d.png").write_bytes(encoded(random_image(1)))
    (tmp_path / "images" / "copy of d.png").write_bytes(encoded(random_image(1)))
    negative = {"images": ["copy of d.png"], "instruction": "another instruction"}
    corpus = write_rows(
        tmp_path / "rows" / "a.jsonl",
        [
            {"key": "1", "query_text": "a", "target_text": "b", "negatives": [negative, {"text": "n"}]},
            {"key": "2", "query_text": "c", "target_images": ["d.png"]},
        ],
    ).parents[1]
    prepare(str(corpus), str(tmp_path / "out"), config())
    pairs = read_rows(str(tmp_path / "out"), split_prefix="train").examples(np.arange(2), np.zeros(2, dtype=bool))
    a, c = sorted(pairs, key=lambda pair: pair.query.text or "")
    model, collator, _ = read_model(tiny_model_dir)
    batch = collator.examples([a, c])
    with torch.no_grad():
        queries, targets, (copy, n) = model(batch).embeddings.split([2, 2, 2])
        loss = retrieval_of(model(batch).embeddings, [batch], load_config("micro", ["loss.symmetric=false"]).loss).loss
    assert not torch.allclose(copy, targets[1], atol=1e-3), "the instruction is no content, but decides the embedding"

    def term(query: torch.Tensor, *candidates: torch.Tensor) -> torch.Tensor:  # the first is the target
        return -(torch.stack(candidates) @ query / 0.05).log_softmax(0)[0]

    expected = (term(queries[0], targets[0], targets[1], copy, n) + term(queries[1], targets[1], targets[0], n)) / 2
    torch.testing.assert_close(loss, expected)


@pytest.mark.ray
def test_shrunk_images_and_unread_splits_are_counted_and_said(
    tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A photo keeps its size without a preset; with a lower limit the manifest has what was lost, each image once."""
    corpus = tmp_path / "photos"
    (corpus / "images").mkdir(parents=True)
    for name, size in (("photo.jpg", (1024, 768)), ("poster.jpg", (4000, 3000)), ("icon.png", (64, 64))):
        (corpus / "images" / name).write_bytes(
            encoded(random_image(1, size), Path(name).suffix[1:].replace("jpg", "jpeg"))
        )
    names = ["photo.jpg", "poster.jpg", "icon.png", "photo.jpg", "poster.jpg", "photo.jpg"]
    rows = [{"query_images": [name], "target_text": str(i), "split": "extra"} for i, name in enumerate(names)]
    write_rows(corpus / "r.jsonl", rows)
    found = {}
    for limit in (None, 4096):
        settings = ["prepare.rows_per_task=2", *([f"prepare.encode_max_pixels={limit}"] if limit else [])]
        out = tmp_path / f"out {limit}"
        with caplog.at_level(logging.WARNING):
            manifest = prepare(str(corpus), str(out), load_config("micro", settings))
        sizes = sorted((i["width"], i["height"]) for i in table(out / "images"))
        found[limit] = (sizes, manifest.images_shrunk, manifest.largest_source_pixels)
        assert manifest.unread_splits == {"extra": 6}
    assert found[None] == ([(64, 64), (1024, 768), (1156, 867)], 1, 12_000_000)
    assert found[4096] == ([(64, 64), (73, 55), (73, 55)], 2, 12_000_000)
    assert "6 rows are of split 'extra', which no job reads" in caplog.text


def test_an_output_among_annotations_is_inside_the_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "coco" / "annotations"
    folder.mkdir(parents=True)
    (folder / "captions_val2017.json").write_text('{"annotations": [], "images": []}')
    corpus = sources.find(str(folder))
    with pytest.raises(ConfigError, match="is inside the corpus"):
        require_outside(str(folder), corpus, str(folder / "out"))
    require_outside(str(folder), corpus, str(tmp_path / "coco" / "out"))
