"""``crem embed``: vectors equal the model's own, bad items are rows, a resumed run does only what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crem
from crem.config import RunConfig, load_config
from crem.errors import CheckpointError, ConfigError, ResourceError
from pipelines.corpus import work_plan
from pipelines.corpus.prepare import prepare
from pipelines.embedding.embed import embed
from pipelines.embedding.output import EmbedManifest
from tests.pipelines.conftest import bomb, encoded, part_of, random_image, table, write_nasty_corpus, write_rows

pytestmark = pytest.mark.ray


def config(*overrides: str) -> RunConfig:
    return load_config("micro", ["embed.batch_size=4", *overrides])


def vectors(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["embedding"] for row in rows], np.float32)


@pytest.fixture(scope="module")
def other_model_dir(tiny_model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same weights under another prompt: another fingerprint."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model_dir, folder)
    description = json.loads((folder / "crem.json").read_text())
    description["model"]["prompt"]["embedding_instruction"] = "Otherwise."
    (folder / "crem.json").write_text(json.dumps(description))
    return str(folder)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven rows of every kind in two files, six of them bad."""
    folder = tmp_path_factory.mktemp("items")
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(encoded(random_image(1)))
    (folder / "images" / "bad.jpg").write_bytes(b"no image")
    (folder / "images" / "bomb.png").write_bytes(bomb())
    good = [
        {"id": 1, "text": "a red apple"},
        {"id": 2, "image": "a.png", "uri": "shop/a"},
        {"id": 3, "text": "both", "images": ["a.png", "a.png"], "instruction": "Find it."},
        {"id": "word", "text": "ünïcode 漢字 🍎"},
        {"uri": "a.png"},
    ]
    bad: list[dict[str, Any]] = [
        {"id": 11, "text": "  "},
        {"id": 12, "image": "bad.jpg", "uri": "kept"},
        {"id": 13, "image": "bomb.png"},
        {"id": 14, "images": ["a.png", "gone.png"]},
        {"id": 15, "image": "http://example.invalid/x.png"},
    ]
    write_rows(folder / "a.jsonl", good + bad)
    with (folder / "a.jsonl").open("a") as file:
        file.write("{not json\n")
    return folder


@pytest.fixture(scope="module")
def embedded(items: Path, tiny_model_dir: str, local_ray: None) -> tuple[Path, EmbedManifest]:
    return items / "out", embed(tiny_model_dir, str(items / "a.jsonl"), str(items / "out"), config())


def test_bad_items_are_rows_with_an_error_and_all_are_counted(embedded: tuple[Path, EmbedManifest]) -> None:
    out, counts = embedded
    rows = table(out)
    assert (counts.rows_in, counts.rows_out, counts.embedded, counts.errors) == (11, 11, 5, 6)
    assert [(row["error"] or "").partition(":")[0] for row in rows] == [
        *[""] * 5,
        "empty_item",
        "image_corrupt",
        "image_too_large",
        "image_missing",
        "uri_refused",
        "bad_row",
    ]
    assert [row["embedding"] is None for row in rows] == [False] * 5 + [True] * 6
    ids = [row["id"] for row in rows]
    assert ids[:4] + ids[5:10] == ["1", "2", "3", "word", "11", "12", "13", "14", "15"], "of several types: as text"
    assert (counts.failed["image_corrupt"], sum(counts.failed.values()), counts.repeated_ids) == (1, 6, 0)
    assert (rows[0]["text"], rows[1]["uri"], rows[6]["uri"]) == ("a red apple", "shop/a", "kept")
    assert json.loads((out / "manifest.json").read_text()) == counts.model_dump(mode="json")


def test_cut_texts_are_counted_also_of_parts_that_an_earlier_run_wrote(
    tiny_model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    long = "q z x j " * 5_000
    tokens = len(crem.load(tiny_model_dir).collator.prompts.tokenizer(long).input_ids)
    rows = [{"id": i, "text": long if i == 2 else "q z x j " * 50 if i == 5 else "short"} for i in range(8)]
    write_rows(tmp_path / "items.jsonl", rows)
    monkeypatch.setattr(work_plan, "GROUP_PIECES", 1)
    for resumed in (0, 4):  # the second run finds the first part finished, and the third row in it
        made = embed(
            tiny_model_dir, str(tmp_path / "items.jsonl"), str(tmp_path / "out"), config("embed.rows_per_task=4")
        )
        assert (made.resumed, made.shards) == (resumed, 2)
        assert (made.embedded, made.cut, made.longest_text, made.max_text_tokens) == (8, 2, tokens, 64)
        assert made.cut_sentence == (
            "2 of 8 items lost the end of a text, which is cut to 64 tokens (model.prompt.max_text_tokens); "
            f"the longest had {tokens:,}"
        )
        part_of(tmp_path / "out", 1).unlink()


def test_vectors_are_those_of_the_model_itself(
    embedded: tuple[Path, EmbedManifest], items: Path, tiny_model_dir: str
) -> None:
    model = crem.load(tiny_model_dir)
    image = encoded(random_image(1))
    own = model.embed(
        [
            "a red apple",
            crem.Item(images=[image]),
            crem.Item(text="both", images=[image, image], instruction="Find it."),
            "ünïcode 漢字 🍎",
            crem.Item(images=[image]),
        ]
    )
    got = vectors(table(embedded[0])[:5])
    assert np.abs(np.linalg.norm(got, axis=1) - 1).max() < 1e-5
    assert (got * own).sum(1).min() > 1 - 1e-5
    assert (got[0] * own[1]).sum() < 0.999  # the model tells items apart, so the line above can fail


def test_files_carry_the_fingerprint_and_plain_vectors(
    embedded: tuple[Path, EmbedManifest], tiny_model_dir: str
) -> None:
    out, counts = embedded
    model = crem.load(tiny_model_dir)
    for file in out.glob("rows/*.parquet"):
        found = pq.ParquetFile(file).schema_arrow
        assert found.field("embedding").type == pa.list_(pa.float32(), model.dim)
        assert json.loads(found.metadata[b"crem"]) == {
            "fingerprint": model.fingerprint,
            "dim": model.dim,
            "model": tiny_model_dir,
            "chorus_tokens": 4,
            "vector": "fp32",
            "states_dim": None,
            "memory": "off",
        }
    assert (counts.fingerprint, counts.dim) == (model.fingerprint, model.dim)


def test_images_of_prepared_tables_and_resuming(
    tmp_path: Path, tiny_model_dir: str, other_model_dir: str, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    manifest = prepare(str(write_nasty_corpus(tmp_path / "nasty")), str(prepared), config("prepare.rows_per_task=8"))
    images = {row["id"]: row["uri"] for row in table(prepared / "images")}
    part = next((prepared / "images").iterdir())
    shutil.copy(part, prepared / "images" / "part-of-another-version.parquet")  # not in the manifest's list
    monkeypatch.setattr(work_plan, "GROUP_PIECES", 1)
    small = config("embed.rows_per_task=3")
    first = embed(tiny_model_dir, str(prepared), str(out), small)
    assert (first.rows_in, first.embedded, first.errors, first.resumed) == (manifest.images, 8, 0, 0)
    assert {row["id"]: row["uri"] for row in table(out)} == images
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("rows/*.parquet")}
    assert len(before) >= 3
    complete = table(out)

    assert embed(tiny_model_dir, str(prepared), str(out), small).resumed == 8
    lost = part_of(out, 1)
    rows = pq.read_metadata(lost).num_rows
    lost.unlink()  # as if the run had been killed there
    (out / "manifest.json").unlink()
    again = embed(tiny_model_dir, str(prepared), str(out), small)
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("rows/*.parquet")}
    assert {n for n in before if before[n] == after.get(n)} == set(before) - {lost.name}
    assert (again.rows_out, again.resumed) == (8, 8 - rows)
    assert [row["id"] for row in table(out)] == [row["id"] for row in complete]
    assert np.allclose(vectors(table(out)), vectors(complete), atol=1e-5)
    assert embed(tiny_model_dir, str(prepared), str(out), small).resumed == 8
    assert not (out / "_work").exists()

    mine, theirs = crem.load(tiny_model_dir).fingerprint, crem.load(other_model_dir).fingerprint
    assert mine != theirs
    with pytest.raises(ConfigError, match=f"embeddings of model {mine}.*this model is {theirs}"):
        embed(other_model_dir, str(prepared), str(out), small)
    write_rows(tmp_path / "else.jsonl", [{"text": "t"}])
    with pytest.raises(ConfigError, match=r"begun from other input: .*prepared \(.*now it is .*else\.jsonl"):
        embed(tiny_model_dir, str(tmp_path / "else.jsonl"), str(out), small)
    assert [row["id"] for row in table(out)] == [row["id"] for row in complete]  # the refusals changed nothing
    fresh = embed(other_model_dir, str(tmp_path / "else.jsonl"), str(out), config(), fresh=True)
    assert (fresh.rows_out, fresh.fingerprint) == (1, theirs)
    assert [row["text"] for row in table(out)] == ["t"]


def test_what_cannot_be_embedded_is_refused_with_the_remedy(
    tmp_path: Path, tiny_model_dir: str, local_ray: None
) -> None:
    source, out = str(write_rows(tmp_path / "i.jsonl", [{"text": "t"}])), str(tmp_path / "out")
    with pytest.raises(ConfigError, match="does not exist"):
        embed(tiny_model_dir, str(tmp_path / "nowhere"), out, config())
    with pytest.raises(ConfigError, match="has no rows"):
        embed(tiny_model_dir, str(write_rows(tmp_path / "blank.jsonl", [])), out, config())
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        embed(str(tmp_path / "no-model"), source, out, config())
    with pytest.raises(ResourceError, match=r"1 GPU, and the cluster has 1 nodes .*; lower embed\.min_actors"):
        embed(tiny_model_dir, source, out, config("embed.gpus_per_actor=1"))
    (tmp_path / "half" / "rejected").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds no completed prepared tables"):
        embed(tiny_model_dir, str(tmp_path / "half"), out, config())
    assert not Path(out).exists()


def test_an_image_folder_gives_a_vector_for_each_picture(tmp_path: Path, tiny_model_dir: str, local_ray: None) -> None:
    folder, out = tmp_path / "items", tmp_path / "out"
    for number in range(4):
        (folder / "train").mkdir(parents=True, exist_ok=True)
        (folder / "train" / f"{number}.png").write_bytes(encoded(random_image(number)))
    rows = [{"file_name": f"{number}.png", "text": "<image>\na box", "mood": 1} for number in range(4)]
    write_rows(folder / "train" / "metadata.jsonl", rows)
    counts = embed(tiny_model_dir, str(folder / "train"), str(out), config())
    assert (counts.embedded, counts.errors) == (4, 0)
    found = table(out)
    assert [row["uri"] for row in found] == ["0.png", "1.png", "2.png", "3.png"]
    assert {row["text"] for row in found} == {"a box"}
    assert len({row["id"] for row in found}) == 4
    first = crem.Item(text="a box", images=[encoded(random_image(0))])
    assert np.allclose(vectors(found)[0], crem.load(tiny_model_dir).embed([first])[0], atol=1e-5)
    assert len({tuple(row["embedding"]) for row in found}) == 4
    with pytest.raises(ConfigError, match=r"begun with other settings: side was None and is 'query'.*--fresh"):
        embed(tiny_model_dir, str(folder / "train"), str(out), config("embed.side=query"))


def test_a_table_of_nothing_but_errors_is_no_success(tmp_path: Path, tiny_model_dir: str, local_ray: None) -> None:
    source = write_rows(tmp_path / "i.jsonl", [{"image": "gone.png"}, {"image": "away.png"}])
    with pytest.raises(
        ConfigError, match=r"none of the 2 items could be embedded: \{'image_missing': 2\}.*run again with --fresh"
    ):
        embed(tiny_model_dir, str(source), str(tmp_path / "out"), config())
    assert [row["error"].partition(":")[0] for row in table(tmp_path / "out")] == ["image_missing"] * 2


def test_columns_that_embed_does_not_know_are_named(
    tmp_path: Path, tiny_model_dir: str, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_rows(tmp_path / "i.jsonl", [{"text": "a", "mood": 1}] * 40 + [{"text": "b", "late": 2}])
    embed(tiny_model_dir, str(source), str(tmp_path / "out"), config())
    assert "column 'mood' is not known to texts and is not read" in caplog.text
    assert "column 'late' is not known to texts and is not read (1 rows)" in caplog.text
    wrong = write_rows(tmp_path / "w.jsonl", [{"text": "a", "imagee": "a.png"}])
    with pytest.raises(ConfigError, match="'imagee'.*did you mean 'image'"):
        embed(tiny_model_dir, str(wrong), str(tmp_path / "w"), config())
