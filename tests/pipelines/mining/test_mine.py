"""``crem mine`` on emoji with the shipped model: near, never of the same concept, as all pairs compared say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crem
from crem.errors import ConfigError, ResourceError
from pipelines.corpus.verify import verify
from pipelines.mining.mine import MineSummary, mine
from pipelines.tables.manifest import read_manifest
from pipelines.tables.prepared import item_of, read_rows
from pipelines.tables.storage import Folder
from tests.pipelines.conftest import table
from tests.pipelines.mining.conftest import MODEL, concept, config

pytestmark = pytest.mark.ray


def concepts_of(rows: list[dict[str, Any]]) -> dict[tuple[str | None, tuple[int, ...]], str]:
    """The concept of every target, by its text and images."""
    return {
        (row["target"]["text"], tuple(row["target"]["images"])): concept(row["key"])
        for row in rows
        if row["split"] == "train"
    }


def test_negatives_are_added_and_nothing_else_changes(prepared: str, mined: tuple[Path, MineSummary]) -> None:
    out, summary = mined
    before, after = ({row["id"]: row for row in table(Path(place) / "rows")} for place in (prepared, out))
    assert before.keys() == after.keys() and summary.rows == len(before)
    added = 0
    for row_id, row in before.items():
        new = after[row_id]
        assert row | {"negatives": None} == new | {"negatives": None}
        kept = len(row["negatives"] or [])
        assert new["negatives"][:kept] == (row["negatives"] or [])
        added += len(new["negatives"]) - kept
        assert row["split"] == "train" or len(new["negatives"]) == kept
    assert added == summary.negatives > 2 * len(before)
    manifest = read_manifest(Folder.at(out))
    stored = manifest.config["mine"]
    assert (manifest.rows_in, manifest.rows_out, manifest.kind) == (len(before), len(before), "mine")
    assert (stored["fingerprint"], stored["negatives_added"]) == (summary.fingerprint, added)
    assert summary.by_reason["not_of_the_split"] == 1
    assert verify(str(out)).faults == ()
    loaded = read_rows(str(out), split_prefix="train")
    every = np.arange(loaded.table.num_rows)
    assert sum(len(e.negatives) for e in loaded.examples(every, np.zeros(len(every), np.bool_))) == added + 1


def test_no_negative_is_of_the_same_concept_and_they_are_nearer_than_chance(
    prepared: str, mined: tuple[Path, MineSummary]
) -> None:
    out, _ = mined
    rows = [row for row in table(out / "rows") if row["split"] == "train"]
    concepts = concepts_of(rows)
    targets = {
        task: sorted({k for k in concepts if bool(k[1]) == (task == "text_to_image")})
        for task in ("text_to_image", "image_to_text")
    }
    images = read_rows(str(out), split_prefix="train")
    model = crem.load(MODEL)
    rng = np.random.default_rng(0)
    sample = [rows[i] for i in rng.choice(len(rows), 60, replace=False)]
    nearer = []
    for row in sample:
        mined_here = [n for n in row["negatives"] if n["text"] != "something that was there before"]
        for negative in mined_here:
            key = (negative["text"], tuple(negative["images"]))
            assert key in targets[row["task"]], "a target of the same task"
            assert concepts[key] != concept(row["key"]), (row["key"], key)
        others = [k for k in targets[row["task"]] if concepts[k] != concept(row["key"])]
        by_chance = [others[i] for i in rng.choice(len(others), 8)]
        random_items = [
            item_of({"text": t, "images": list(i), "instruction": None, "image_at": []}, images.image)
            for t, i in by_chance
        ]
        vectors = model.embed(
            [item_of(row["query"], images.image), *(item_of(n, images.image) for n in mined_here), *random_items]
        )
        scores = vectors[1:] @ vectors[0]
        if mined_here:
            nearer.append(scores[: len(mined_here)].mean() - scores[len(mined_here) :].mean())
    assert len(nearer) > 30 and np.mean(nearer) > 0.1 and np.mean(np.array(nearer) > 0) > 0.9


def test_what_was_mined_is_what_all_pairs_say(prepared: str, mined: tuple[Path, MineSummary]) -> None:
    """An oracle over the vectors of the model itself, with the rules written out again."""
    out, _ = mined
    rows = [row for row in table(Path(prepared) / "rows") if row["split"] == "train"]
    images = read_rows(prepared, split_prefix="train")
    model = crem.load(MODEL)

    def content(side: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
        return " ".join((side["text"] or "").lower().split()), tuple(side["images"])

    sides = {content(row[s]): row[s] for row in rows for s in ("query", "target")}
    vectors = dict(zip(sides, model.embed([item_of(s, images.image) for s in sides.values()]), strict=True))
    pairs = {(content(row["query"]), content(row["target"])) for row in rows}
    records = {record["id"]: record for record in table(out / "mined")}
    rng = np.random.default_rng(1)
    for row in (rows[i] for i in rng.choice(len(rows), 80, replace=False)):
        query, target = content(row["query"]), content(row["target"])
        sharing = {q for q, t in pairs if t == target} | {query}
        right = {t for q, t in pairs if q in sharing} | {query, target}
        candidates = {content(r["target"]) for r in rows if r["task"] == row["task"]} - right
        scored = sorted(((float(vectors[query] @ vectors[c]), c) for c in candidates), reverse=True)[:200]
        positive = float(vectors[query] @ vectors[target])
        expected = [score for score, _ in scored if score <= positive - 0.05 * abs(positive)][:3]
        record = records[row["id"]]
        assert record["positive_score"] == pytest.approx(positive, abs=1e-5)
        assert [n["score"] for n in record["negatives"]] == pytest.approx(expected, abs=1e-5)
        assert (record["reason"] is None) == (len(expected) == 3)


@pytest.mark.slow
def test_any_number_of_workers_any_kill_and_other_settings(
    prepared: str, mined: tuple[Path, MineSummary], tmp_path: Path
) -> None:
    out, summary = mined
    again = mine(MODEL, prepared, str(out), config())
    assert again.was_complete and again.negatives == summary.negatives
    for override, named in (("mine.negatives=2", "negatives"), ("mine.max_ratio=0.9", "max_ratio")):
        with pytest.raises(ConfigError, match=f"another {named}"):
            mine(MODEL, prepared, str(out), config(override))
    with pytest.raises(ConfigError, match="holds the tables themselves"):
        mine(MODEL, prepared, prepared, config())
    # as a killed run leaves it: some parts, no manifest
    shutil.copytree(out, tmp_path / "killed")
    (tmp_path / "killed" / "manifest.json").unlink()
    vectors = sorted((tmp_path / "killed" / "vectors").iterdir())
    vectors[0].unlink()
    vectors[1].write_bytes(b"half a part")
    parts = sorted((tmp_path / "killed" / "mined").iterdir())
    for part in parts[1:]:
        part.unlink()
        (tmp_path / "killed" / "rows" / part.name).write_bytes(b"half a part")
    resumed = mine(MODEL, prepared, str(tmp_path / "killed"), config("embed.max_actors=3"))
    assert resumed.negatives == summary.negatives
    assert not (tmp_path / "killed" / "vectors").exists(), "the first run kept them by its setting"
    for folder in ("rows", "mined", "images"):
        for part in sorted((out / folder).iterdir()):
            assert part.read_bytes() == (tmp_path / "killed" / folder / part.name).read_bytes(), part


def test_a_model_that_needs_a_gpu_is_refused_where_there_is_none(prepared: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"1 GPU, and Ray has 0 GPU here; .*--preset micro"):
        mine(MODEL, prepared, str(tmp_path / "out"), config("embed.gpus_per_actor=1"))
    assert not (tmp_path / "out").exists()
