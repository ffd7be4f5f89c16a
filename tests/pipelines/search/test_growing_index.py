"""``crem index`` on embeddings that grow, shrink and change; filters, words and damage, all by the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.cli import main
from crem.errors import ConfigError
from pipelines.search import index as index_job
from pipelines.search.index_dataset import IndexSummary
from pipelines.search.opened_index import VectorIndex
from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.storage import Folder

DIM = 16


def vectors_of(ids: list[str]) -> np.ndarray:
    """Of each id its own."""
    made = np.array([np.random.default_rng(zlib.crc32(i.encode())).normal(size=DIM) for i in ids], np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def write_part(file: Path, ids: list[str], *, price: float = 1.0, model: str = "aaaa", text: str = "item") -> None:
    """A part as crem embed writes it with string ids and kept columns; the first row is an error."""
    values = vectors_of(ids)
    stamp = EmbeddingStamp(model, DIM, "crem-micro")
    columns: dict[str, Any] = {
        "id": pa.array(["bad", *ids]),
        "embedding": pa.array([None, *values.tolist()], pa.list_(pa.float32(), DIM)),
        "error": pa.array(["empty_item: x", *[None] * len(ids)], pa.string()),
        "uri": pa.array([None, *(f"{i}.png" for i in ids)], pa.string()),
        "text": pa.array([None, *(f"{text} {i}" for i in ids)], pa.string()),
        "price": pa.array([None, *(price + n for n in range(len(ids)))], pa.float64()),
        "tags": pa.array([None, *(["new"] if n % 2 else [] for n in range(len(ids)))], pa.list_(pa.string())),
    }
    table = pa.table(columns).replace_schema_metadata({b"crem": json.dumps(vars(stamp)).encode()})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, write_page_checksum=True)


def index(source: Path | str, out: Path | str, *settings: str) -> IndexSummary:
    """Of ``crem index``, by the command line."""
    assert main(["index", str(source), "--out", str(out), *settings]) == 0
    summary = IndexSummary.read(Folder.at(str(out)))
    assert summary is not None
    return summary


def index_in_a_process(source: Path, out: str, *settings: str) -> IndexSummary:
    """The same in a process of its own: workers of a Ray that is there already do not have the keys of the storage."""
    subprocess.run([sys.executable, "-m", "crem.cli", "index", str(source), "--out", out, *settings], check=True)
    summary = IndexSummary.read(Folder.at(out))
    assert summary is not None
    return summary


def found(place: Path | str, wanted: str, k: int = 5, where: str | None = None) -> list[str]:
    """Ids of the hits for the vector of an id."""
    return [hit.id for hit in VectorIndex(str(place)).search(vectors_of([wanted]), k, where)[0]]


@pytest.mark.parametrize("settings", [(), ("index.exact_below=300", "index.refine=40", "index.probes=30")])
def test_an_index_follows_its_embeddings(
    tmp_path: Path, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "e", tmp_path / "i"
    ids = {n: [f"{n}-{i}" for i in range(200)] for n in "abcd"}
    for n in "abc":
        write_part(source / f"part-{n}.parquet", ids[n])
    first = index(source, out, *settings)
    assert (first.count, first.skipped, first.parts, first.added) == (600, 3, 3, 600)
    assert first.index == ("IVF_RQ" if settings else "exact")
    printed = capsys.readouterr().out
    assert "600 vectors of 16 from 3 parts (added 600, removed 0); 3 rows have none" in printed
    assert "recall@10 " in printed and "bytes a vector: " in printed
    before = VectorIndex(str(out))

    again = index(source, out, *settings)
    assert again == first, "nothing was new"
    assert "no vectors added or removed" in capsys.readouterr().out

    (source / "part-a.parquet").unlink()  # gone
    write_part(source / "part-b.parquet", [*ids["b"][:199], "b-changed"], price=500)  # changed
    write_part(source / "part-d.parquet", ids["d"])  # new
    files = {path: path.stat().st_mtime_ns for path in (out / "vectors.lance" / "data").iterdir()}
    second = index(source, out, *settings)
    assert (second.count, second.added, second.removed, second.parts) == (600, 400, 400, 3)
    assert second.version > first.version
    kept = [path for path in files if path.exists()]
    assert [path for path in kept if path.stat().st_mtime_ns != files[path]] == [], "no file is written twice"
    for wanted in ("c-7", "d-3", "b-changed", "b-3"):
        assert found(out, wanted, 1) == [wanted]
    everything = [hit.id for hit in VectorIndex(str(out)).search(vectors_of(["c-1"]), 600)[0]]
    if not settings:
        assert sorted(everything) == sorted([*ids["b"][:199], "b-changed", *ids["c"], *ids["d"]])
    assert not any(i.startswith("a-") or i == "b-199" for i in everything)
    assert [hit.id for hit in before.search(vectors_of(["a-5"]), 1)[0]] == ["a-5"], "an open search has its version"

    write_part(source / "part-a.parquet", ids["a"])
    index(source, out, *settings)
    versions = {v["version"] for v in lance.dataset(str(out / "vectors.lance")).versions()}
    assert len(versions) == 2 and first.version not in versions, "of the complete versions two are kept"
    assert sorted(path.name for path in out.iterdir() if path.name.startswith("parts-")) == [
        f"parts-{version:06d}.parquet" for version in sorted(versions)
    ]
    opened = lancedb.connect(str(out)).open_table("vectors")
    assert opened.count_rows() == 800, "LanceDB opens it as a table"


def test_filters_words_and_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "e", tmp_path / "i"
    write_part(source / "part-0.parquet", [f"x-{i}" for i in range(50)])
    write_part(source / "part-1.parquet", ["needle"], text="Zugspitze")
    index(source, out, "index.full_text=true", "index.filters=[price]")
    names = {i["name"] for i in lance.dataset(str(out / "vectors.lance")).list_indices()}
    assert names == {"price_idx", "text_words"}
    assert set(found(out, "x-40", 50, "price < 5 AND array_has(tags, 'new')")) == {"x-1", "x-3"}
    opened = VectorIndex(str(out))
    vector = vectors_of(["x-3"])[0]
    by_vector = [hit.id for hit in opened.search(vector[None], 51)[0]]
    assert by_vector.index("needle") > 5, "the vectors miss it"
    hybrid = opened.hybrid(vector, "zugspitze", 3)
    assert [hit.id for hit in hybrid[:2]] in (["x-3", "needle"], ["needle", "x-3"])
    assert hybrid[0].columns["price"] == 1.0 or hybrid[1].columns["price"] == 1.0
    assert [hit.id for hit in opened.hybrid(vector, "zugspitze", 3, "price > 2")] == by_vector_above(opened, vector)
    assert [hit.id for hit in opened.hybrid(vector, "nowhere", 2)] == by_vector[:2], "words that no text has"
    capsys.readouterr()
    wrong = {"prize < 4": "No field named prize", "price <": "an expression", "price < 'x'": "could not convert"}
    for where, message in wrong.items():
        with pytest.raises(ConfigError, match=rf"--where .*{message}.*columns are id \(string\), .*price \(double\)"):
            opened.search(vector[None], 1, where)


def test_a_search_by_another_model_or_without_words_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "e", tmp_path / "i"
    write_part(source / "part-0.parquet", ["a", "b"])
    index(source, out)
    capsys.readouterr()
    assert main(["search", "apple", "--index", str(out)]) == 1
    assert "was made by model aaaa (crem-micro), and this model is" in capsys.readouterr().err
    assert main(["search", "--hybrid", "--image", "x.png", "--index", str(out)]) == 2
    assert "--hybrid looks for words, and there is no text" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no index of words; run crem index .* index\.full_text=true"):
        VectorIndex(str(out)).hybrid(vectors_of(["a"])[0], "a", 1)
    assert main(["index", str(source), "--out", str(out), "index.filters=[colour]"]) == 2
    assert "index.filters names 'colour', and the embeddings have id, embedding" in capsys.readouterr().err


def test_what_is_damaged_or_mixed_is_refused_and_the_index_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "e", tmp_path / "i"
    write_part(source / "part-0.parquet", [f"a{i}" for i in range(2000)])
    first = index(source, out)
    capsys.readouterr()
    write_part(source / "part-1.parquet", [f"b{i}" for i in range(2000)])
    whole = (source / "part-1.parquet").read_bytes()
    for at in (len(whole) // 3, len(whole) - 20):  # a page, and the footer
        flipped = bytearray(whole)
        flipped[at] ^= 255
        (source / "part-1.parquet").write_bytes(flipped)
        assert main(["index", str(source), "--out", str(out)]) == 2
        assert "part-1.parquet cannot be read" in capsys.readouterr().err
    write_part(source / "part-1.parquet", ["b"], model="bbbb")
    assert main(["index", str(source), "--out", str(out)]) == 2
    assert "mixes embeddings of the models aaaa (part-0.parquet) and bbbb" in capsys.readouterr().err
    assert IndexSummary.read(Folder.at(out)) == first and found(out, "a7", 1) == ["a7"]

    (source / "part-1.parquet").unlink()
    dataset = lance.dataset(str(out / "vectors.lance"))
    dataset.delete("id = 'a7'")  # as a build that was interrupted after its commit leaves it
    assert found(out, "a7", 1) == ["a7"], "a search reads the version that index.json names"
    write_part(source / "part-1.parquet", ["b"])
    assert (index(source, out).count, found(out, "a7", 1), found(out, "b", 1)) == (2001, ["a7"], ["b"])

    for file in (out / "vectors.lance" / "data").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="is damaged: .*; run crem index into it again with --fresh"):
        VectorIndex(str(out)).search(vectors_of(["a7"]), 1)
    assert index(source, out, "--fresh").count == 2001 and found(out, "a7", 1) == ["a7"]


def test_an_index_of_an_interrupted_build_takes_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "e", tmp_path / "i"
    for n in range(3):
        write_part(source / f"part-{n}.parquet", [f"{n}-{i}" for i in range(50)])

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(index_job, "replace_all_rows", fail)
        assert main(["index", str(source), "--out", str(out)]) == 130
    written = sorted((out / "vectors.lance" / "data").iterdir())
    assert len(written) == 3 and IndexSummary.read(Folder.at(out)) is None
    assert index(source, out, "index.keep_versions=1").count == 150
    assert not (out / "_work").exists() and found(out, "2-7", 1) == ["2-7"]


def test_on_object_storage_an_index_grows(tmp_path: Path, s3_env: Any) -> None:
    out = f"s3://{s3_env.bucket}/grown"
    for n, count in enumerate((40, 41)):
        write_part(tmp_path / "e" / f"part-{n}.parquet", [f"{n}-{i}" for i in range(count)])
        summary = index_in_a_process(tmp_path / "e", out, "index.full_text=true", "index.filters=[price]")
    assert (summary.count, summary.added, summary.removed) == (81, 41, 0)
    assert found(out, "0-7", 1) == ["0-7"] and found(out, "1-40", 1, "price = 41") == ["1-40"]
    (tmp_path / "e" / "part-0.parquet").unlink()
    assert index_in_a_process(tmp_path / "e", out, "index.full_text=true", "index.filters=[price]").removed == 40
    assert VectorIndex(out).hybrid(vectors_of(["1-3"])[0], "item", 1)[0].id == "1-3"


def by_vector_above(opened: VectorIndex, vector: np.ndarray) -> list[str]:
    """Without the needle, whose price is 1."""
    return [hit.id for hit in opened.search(vector[None], 3, "price > 2")[0]]


@pytest.mark.slow
@pytest.mark.ray
def test_tasks_build_a_segment_each(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_job, "_FRAGMENT_BYTES", 4 * DIM * 300)  # of 300 vectors, so that parts are not joined
    source, out = tmp_path / "e", tmp_path / "i"
    for n in "abc":
        write_part(source / f"part-{n}.parquet", [f"{n}-{i}" for i in range(400)])
    settings = ("index.exact_below=300", "index.segment_rows=500", "index.refine=40", "index.probes=30")
    made = index(source, out, *settings)
    assert (made.index, made.count) == ("IVF_RQ", 1200) and made.recall_at_10 is not None and made.recall_at_10 > 0.95
    (vectors,) = lance.dataset(str(out / "vectors.lance")).describe_indices()
    assert len(vectors.segments) == 3
    for wanted in ("a-1", "b-399", "c-7"):
        assert found(out, wanted, 1) == [wanted]
