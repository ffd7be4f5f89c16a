"""Vectors of ``crem embed`` and ``crem index`` give the negatives that ``crem mine`` finds with vectors of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.config import load_config
from crem.errors import CheckpointError, ConfigError, CremError
from pipelines.embedding.embed import embed
from pipelines.embedding.output import EmbedPlan
from pipelines.mining import given_vectors
from pipelines.mining.given_vectors import GivenVectors, VectorPiece, open_vectors, read_piece
from pipelines.mining.mine import MineSummary, mine
from pipelines.search.embedded_parts import EmbeddedPart
from pipelines.search.index import build
from pipelines.tables import schema
from pipelines.tables.manifest import read_manifest
from pipelines.tables.storage import Folder
from tests.pipelines.conftest import table
from tests.pipelines.mining.conftest import MODEL, config

STAMP = schema.EmbeddingStamp("aaaa", 2, "some model", 4)


def write_vectors(folder: Path, ids: list[int], vectors: list[list[float] | None], stamp: Any = STAMP) -> Folder:
    """A part of ``crem embed``."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = pa.nulls(len(ids), pa.string())
    columns = [pa.array(ids), pa.array(vectors, pa.list_(pa.float32(), stamp.dim)), texts, texts, texts]
    name = f"part-{len(list(folder.iterdir())):06d}.parquet"
    pq.write_table(pa.table(columns, schema=schema.embeddings(stamp)), folder / name)
    return Folder.at(folder)


def test_vectors_are_found_by_their_ids_and_the_first_of_several_counts() -> None:
    ids = (np.array([5, -3, 9]), np.empty(0, np.int64), np.array([9, 7]))
    given = GivenVectors(STAMP, True, ("a",), (), ids)
    pieces, positions = given.find(np.array([7, 8, -3, 9, 100, -100]))
    assert pieces.tolist() == [2, -1, 0, 0, -1, -1]
    assert positions[pieces >= 0].tolist() == [1, 1, 2]
    assert GivenVectors(STAMP, True, ("a",), (), ()).find(np.array([1]))[0].tolist() == [-1]


def test_a_row_with_an_error_is_no_vector(tmp_path: Path) -> None:
    folder = write_vectors(tmp_path, [1, 2, 3], [[1, 2], None, [5, 6]])
    write_vectors(tmp_path, [4, 5], [None, [9, 10]])
    piece = VectorPiece(folder, ("part-000000.parquet", "part-000001.parquet"))
    vectors, valid = read_piece(piece, np.array([4, 1, 2, 3, 0]))
    assert valid.tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(vectors[valid], [[9, 10], [5, 6], [1, 2]])
    (tmp_path / "part-000001.parquet").write_bytes(b"half a part")
    with pytest.raises(ConfigError, match=r"part-000001\.parquet cannot be read .*run crem embed into that folder"):
        read_piece(piece, np.array([0]))


def test_rows_that_are_gone_from_a_part_are_no_vectors(tmp_path: Path) -> None:
    folder = write_vectors(tmp_path, [1, 2, 3, 1], [[1, 2], [3, 4], [5, 6], [7, 8]])
    name = "part-000000.parquet"
    part = EmbeddedPart(name, "checksum-of rows too", 2, 1, gone=((0, 2),))
    assert given_vectors._ids(folder, part).tolist() == [3, 1]
    vectors, _ = read_piece(VectorPiece(folder, (name,), part), np.array([1]))
    assert vectors.tolist() == [[7, 8]], "the row of this id that counts, not the one before it"


@pytest.mark.parametrize("settings", [[], ["index.exact_below=300"]])
def test_an_index_is_opened_in_pieces_and_keeps_its_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    monkeypatch.setattr(given_vectors, "_INDEX_PIECE", 300)
    vectors = np.random.default_rng(0).normal(size=(700, 2)).astype(np.float32)
    write_vectors(tmp_path / "e", list(range(1000, 1700)), vectors.tolist())
    built = build(str(tmp_path / "e"), str(tmp_path / "i"), load_config("micro", settings))
    given = open_vectors([str(tmp_path / "i")])
    assert (built.index, [piece.first for piece in given.pieces], given.stamp) == (
        "IVF_PQ" if settings else "exact",
        [0, 300, 600],
        STAMP,
    )
    assert [part.tolist() for part in (given.find(np.array([1699, 1300])))] == [[2, 1], [99, 0]]
    found, valid = read_piece(given.pieces[2], np.array([99, 0]))
    assert valid.all() and found.tolist() == vectors[[699, 600]].tolist()


@pytest.mark.slow
@pytest.mark.ray
def test_vectors_alone_need_no_model(prepared: str, mined: tuple[Path, MineSummary], tmp_path: Path) -> None:
    """The vectors that a run kept give the same bytes, and nothing is embedded."""
    out, summary = mined
    again = mine(None, prepared, str(tmp_path), config(), [str(out / "vectors")])
    assert (again.fingerprint, again.negatives) == (summary.fingerprint, summary.negatives)
    for folder in ("rows", "mined"):
        for part in sorted((out / folder).iterdir()):
            assert part.read_bytes() == (tmp_path / folder / part.name).read_bytes(), part
    assert not (tmp_path / "vectors").exists()
    stored = read_manifest(Folder.at(tmp_path)).config["mine"]
    assert (stored["vectors"], stored["exact"]) == ([str(out / "vectors")], True)


@pytest.mark.ray
def test_vectors_that_do_not_fit_are_refused(
    prepared: str, mined: tuple[Path, MineSummary], tmp_path: Path, tiny_model_dir: str
) -> None:
    some = tmp_path / "some"
    shutil.copytree(mined[0] / "vectors", some)
    sorted(some.iterdir())[0].unlink()
    other = write_vectors(tmp_path / "other", [1], [[1, 0]])

    def refused(error: type[CremError], match: str, *vectors: Path | str, **options: Any) -> None:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        with pytest.raises(error, match=match):
            mine(
                options.get("model"), prepared, str(out), config(*options.get("overrides", ())), list(map(str, vectors))
            )
        assert not list(out.rglob("*.parquet"))

    refused(ConfigError, rf"lacks \d+ of \d+ .*of row '.*; crem embed .*give --model {MODEL}", some)
    refused(ConfigError, "was it made of these tables", other.uri)
    refused(CheckpointError, rf"was made by model .* and {tiny_model_dir} is another one", some, model=tiny_model_dir)
    refused(ConfigError, r"mixes models: .* aaaa \(some model\) with 4 chorus tokens", some, other.uri)
    refused(ConfigError, r"chorus_tokens=3, and .* made with 4", other.uri, overrides=["embed.chorus_tokens=3"])
    refused(ConfigError, "holds no Parquet files of embeddings", tmp_path / "nowhere")
    refused(ConfigError, "give --model CHECKPOINT")
    Folder.at(some).write_json({}, EmbedPlan.FILE)
    refused(ConfigError, "that was not finished", some)


@pytest.mark.slow
@pytest.mark.ray
def test_what_embed_and_index_wrote_is_taken_and_the_rest_is_embedded(
    prepared: str, mined: tuple[Path, MineSummary], tmp_path: Path
) -> None:
    images, first, second, index = (str(tmp_path / name) for name in ("images", "first", "second", "index"))
    embed(MODEL, prepared, images, config())
    mine(MODEL, prepared, first, config("mine.keep_vectors=true"), [images])
    texts = table(f"{first}/vectors")
    assert texts and all(row["text"] and row["error"] is None for row in texts), "the images were embedded before"
    build(f"{first}/vectors", index, load_config("micro"))
    mine(None, prepared, second, config(), [index, images])
    for out in (first, second):
        same_negatives(Path(out), mined[0])


def same_negatives(out: Path, expected: Path) -> None:
    """In the same order; similarities differ in the last digit, by the batches of the model."""
    assert [row["negatives"] for row in table(out / "rows")] == [row["negatives"] for row in table(expected / "rows")]
    for ours, theirs in zip(table(out / "mined"), table(expected / "mined"), strict=True):
        assert ours["positive_score"] == pytest.approx(theirs["positive_score"], abs=1e-5)
        assert (ours["id"], ours["dropped"], ours["reason"]) == (theirs["id"], theirs["dropped"], theirs["reason"])
