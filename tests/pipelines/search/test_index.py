"""``crem index`` and ``crem search``: nearest by cosine, exact and quantised, and never across models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crem
from crem.config import load_config
from crem.errors import CheckpointError, ConfigError
from pipelines.embedding.embed import embed
from pipelines.search.index import build
from pipelines.search.opened_index import VectorIndex
from pipelines.search.search import Query, search
from pipelines.tables import schema
from pipelines.tables.storage import Folder
from tests.pipelines.conftest import encoded, random_image, write_rows

CONFIG = load_config("micro")
DIM = 16


def unit(count: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def write_embeddings(file: Path, values: np.ndarray, *, bad: int = 0, first: int = 0, model: str = "aaaa") -> Path:
    """An output file of ``crem embed``: ``bad`` rows without a vector come first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    vectors: list[Any] = [None] * bad + values.tolist()
    columns = {
        "id": [first + i for i in range(len(vectors))],
        "embedding": vectors,
        "error": ["image_corrupt: x" if v is None else None for v in vectors],
        "uri": [f"{file.stem}/{i}" for i in range(len(vectors))],
        "text": [None] * len(vectors),
    }
    stamp = schema.EmbeddingStamp(model, DIM, f"m/{model}")
    pq.write_table(pa.table(columns, schema=schema.embeddings(stamp)), file)
    return file.parent


def test_exact_search_is_the_brute_force_order(tmp_path: Path) -> None:
    values = unit(300)
    write_embeddings(tmp_path / "e" / "a.parquet", values[:100], bad=3)
    write_embeddings(tmp_path / "e" / "b.parquet", values[100:], bad=2, first=1000)
    summary = build(str(tmp_path / "e"), str(tmp_path / "i"), CONFIG)
    assert summary.model_dump(mode="json") == json.loads((tmp_path / "i" / "index.json").read_text())
    assert (summary.count, summary.skipped, summary.index) == (300, 5, "exact")
    assert (summary.fingerprint, summary.dim, summary.model) == ("aaaa", DIM, "m/aaaa")
    queries = unit(5, seed=1)
    for hits, scores in zip(VectorIndex(str(tmp_path / "i")).search(queries, 7), queries @ values.T, strict=True):
        best = np.argsort(-scores)[:7]
        assert [hit.id for hit in hits] == [int(i) + 3 if i < 100 else int(i) - 100 + 1002 for i in best]
        assert np.allclose([hit.score for hit in hits], scores[best], atol=1e-6)
        assert hits[0].uri == (f"a/{best[0] + 3}" if best[0] < 100 else f"b/{best[0] - 98}")


def test_more_asked_for_than_there_is(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e" / "a.parquet", unit(3))
    build(str(tmp_path / "e"), str(tmp_path / "i"), CONFIG)
    assert len(VectorIndex(str(tmp_path / "i")).search(unit(1), 10)[0]) == 3
    with pytest.raises(ConfigError, match="k=0 asks for no result"):
        VectorIndex(str(tmp_path / "i")).search(unit(1), 0)


@pytest.mark.parametrize("kind", ["IVF_RQ", "IVF_PQ"])
def test_above_the_threshold_the_index_is_quantised_and_still_right(tmp_path: Path, kind: str) -> None:
    values = unit(4000)
    write_embeddings(tmp_path / "e" / "a.parquet", values[:2500], bad=1)
    write_embeddings(tmp_path / "e" / "b.parquet", values[2500:], first=2501)
    config = load_config(
        "micro", ["index.exact_below=4000", f"index.quantiser={kind}", "index.probes=63", "index.refine=40"]
    )
    summary = build(str(tmp_path / "e"), str(tmp_path / "i"), config)
    assert (summary.index, summary.count, summary.skipped) == (kind, 4000, 1)
    queries = values[::40]
    exact = np.argsort(-(queries @ values.T), axis=1)[:, :10] + 1
    recalls = []
    for probes in (63, 1):  # the cells matter: one of them does not hold the ten nearest
        Folder.at(tmp_path / "i").write_json(summary.model_dump(mode="json") | {"probes": probes}, summary.FILE)
        found = [[hit.id for hit in hits] for hits in VectorIndex(str(tmp_path / "i")).search(queries, 10)]
        recalls.append(
            np.mean([len(set(ids) & set(best)) / 10 for ids, best in zip(found, exact.tolist(), strict=True)])
        )
        assert [ids[0] for ids in found] == exact[:, 0].tolist()
    assert recalls[0] > 0.95 > 0.8 > recalls[1]
    assert summary.recall_at_10 == pytest.approx(recalls[0], abs=0.03), "what the build says is what a search finds"


def test_what_cannot_be_indexed_is_refused_with_the_remedy(tmp_path: Path) -> None:
    out = str(tmp_path / "i")
    with pytest.raises(ConfigError, match="no Parquet files of embeddings; run crem embed"):
        build(str(tmp_path / "nowhere"), out, CONFIG)
    mixed = write_embeddings(tmp_path / "mixed" / "a.parquet", unit(2))
    write_embeddings(tmp_path / "mixed" / "b.parquet", unit(2), model="bbbb")
    with pytest.raises(ConfigError, match=r"aaaa \(a\.parquet\) and bbbb \(b\.parquet\); index them apart"):
        build(str(mixed), out, CONFIG)
    errors = write_embeddings(tmp_path / "errors" / "a.parquet", unit(0), bad=4)
    with pytest.raises(ConfigError, match="none of the 4 rows"):
        build(str(errors), out, CONFIG)
    write_rows(tmp_path / "plain" / "a.parquet", [{"id": 1}])
    with pytest.raises(ConfigError, match="carries no model fingerprint"):
        build(str(tmp_path / "plain"), out, CONFIG)
    half = write_embeddings(tmp_path / "half" / "a.parquet", unit(2))
    (half / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match="was not finished; run crem embed"):
        build(str(half), out, CONFIG)
    (half / "manifest.json").write_text("{")  # it says how many rows there must be
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged; run crem embed"):
        build(str(half), out, CONFIG)
    with pytest.raises(ConfigError, match="is not an index"):
        VectorIndex(out)


def test_a_new_index_replaces_the_old_and_nothing_else(tmp_path: Path) -> None:
    for count in (5, 2):
        build(str(write_embeddings(tmp_path / "e" / "a.parquet", unit(count))), str(tmp_path / "i"), CONFIG)
    assert len(VectorIndex(str(tmp_path / "i")).search(unit(1), 10)[0]) == 2
    with pytest.raises(ConfigError, match="that crem index did not write"):
        build(str(tmp_path / "e"), str(tmp_path / "e"), CONFIG)


@pytest.mark.ray
def test_search_by_text_and_image_and_never_by_another_model(
    tmp_path: Path, tiny_model_dir: str, local_ray: None
) -> None:
    images = [encoded(random_image(seed)) for seed in range(6)]
    write_rows(tmp_path / "items.parquet", [{"id": i, "bytes": p, "uri": f"p{i}"} for i, p in enumerate(images)])
    embed(tiny_model_dir, str(tmp_path / "items.parquet"), str(tmp_path / "e"), CONFIG)
    build(str(tmp_path / "e"), str(tmp_path / "i"), CONFIG)
    for i, data in enumerate(images):
        best = search(str(tmp_path / "i"), tiny_model_dir, Query(images=(data,), k=3))
        assert (best[0].id, best[0].uri, len(best)) == (i, f"p{i}", 3)
        assert best[0].score == pytest.approx(1, abs=1e-4)
        assert best[1].score <= best[0].score
    model = crem.load(tiny_model_dir)
    query = model.embed(["a red apple"])
    own = np.argsort(-(query @ model.embed(images).T)[0])
    assert [hit.id for hit in search(str(tmp_path / "i"), None, Query("a red apple", k=6))] == own.tolist()

    summary = json.loads((tmp_path / "i" / "index.json").read_text())
    (tmp_path / "i" / "index.json").write_text(json.dumps({**summary, "fingerprint": "feedfeedfeedfeed"}))
    with pytest.raises(CheckpointError, match=f"made by model feedfeedfeedfeed.*this model is {model.fingerprint}"):
        search(str(tmp_path / "i"), tiny_model_dir, Query("a red apple", k=1))


def test_an_index_on_object_storage(tmp_path: Path, s3_env: Any) -> None:
    values = unit(20)
    write_embeddings(tmp_path / "e" / "a.parquet", values)
    place = f"s3://{s3_env.bucket}/index"
    for _ in range(2):  # in a process of its own: workers of a Ray that is there already do not have the keys
        subprocess.run([sys.executable, "-m", "crem.cli", "index", str(tmp_path / "e"), "--out", place], check=True)
    hits = VectorIndex(place).search(values[7:8], 2)[0]
    assert (hits[0].id, hits[0].uri) == (7, "a/7")
    with pytest.raises(ConfigError, match="is not an index"):
        VectorIndex(f"s3://{s3_env.bucket}/nothing")
