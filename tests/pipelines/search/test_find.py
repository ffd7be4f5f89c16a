"""``crem search --rerank`` by the command line, on items that are embedded once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crem
from crem.cli import main
from crem.config import load_config
from pipelines.embedding.embed import embed
from pipelines.search.index import build
from tests.pipelines.conftest import encoded, random_image, write_rows
from tests.pipelines.search.test_index import unit, write_embeddings
from tests.pipelines.search.test_late_interaction import plain

PICTURES = 8


@dataclass(frozen=True)
class Embedded:
    """Items and their index, with states and memories."""

    folder: Path
    model: str

    @property
    def index(self) -> str:
        return str(self.folder / "index")

    def picture(self, number: int) -> Path:
        return self.folder / "items" / f"p{number}.png"


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: str, local_ray: None) -> Embedded:
    folder = tmp_path_factory.mktemp("found")
    made = Embedded(folder, tiny_model_dir)
    rows: list[dict[str, Any]] = [{"id": f"p{n}", "image": f"p{n}.png", "price": n} for n in range(PICTURES)]
    rows += [{"id": "t", "text": "a <b>red</b> apple", "price": 90}]
    write_rows(folder / "items" / "items.jsonl", rows)
    for number in range(PICTURES):
        made.picture(number).write_bytes(encoded(random_image(number)))
    config = load_config("micro", ["embed.states=true", "embed.memory=bf16", "embed.keep=[price]"])
    embed(tiny_model_dir, str(folder / "items" / "items.jsonl"), str(folder / "vectors"), config)
    build(str(folder / "vectors"), made.index, load_config("micro", ["index.full_text=true"]))
    return made


def run(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """The lines that a command prints."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.ray
def test_rerank_orders_by_max_sim(items: Embedded, capsys: pytest.CaptureFixture[str]) -> None:
    model = crem.load(items.model)
    contents = {f"p{n}": items.picture(n) for n in range(PICTURES)} | {"t": "a <b>red</b> apple"}
    states = model.encode_prepared([model.prepare(c) for c in contents.values()], states=True).states
    query = model.encode_prepared([model.prepare(items.picture(3))], states=True).states
    assert states is not None and query is not None
    scores = [plain(query[0].astype(np.float32), each.astype(np.float32)) for each in states]
    expected = dict(zip(contents, scores, strict=True))

    search = ["search", "--image", str(items.picture(3)), "--index", items.index]
    found = run(capsys, *search, "--rerank", "-k", "9")
    assert {hit["id"]: hit["score"] for hit in found} == pytest.approx(expected, abs=2e-3)
    assert [hit["score"] for hit in found] == sorted([hit["score"] for hit in found], reverse=True)
    assert found[0]["id"] == "p3" and found[0]["score"] == pytest.approx(1, abs=1e-3)
    cosines = {hit["id"]: hit["score"] for hit in run(capsys, *search, "-k", "9")}
    assert cosines != pytest.approx(expected, abs=0.02), "MaxSim is not the cosine"
    cut = run(capsys, *search, "--rerank", "-k", "2", "--where", "price BETWEEN 4 AND 80")
    assert [hit["id"] for hit in cut] == [hit["id"] for hit in found if 4 <= hit["columns"]["price"] <= 80][:2]
    hybrid = run(capsys, "search", "apple", "--hybrid", "--rerank", "--index", items.index, "-k", "9")
    assert sorted(hit["id"] for hit in hybrid) == sorted(contents), "both searches' hits are compared"
    assert run(capsys, *search, "--rerank", "--where", "price > 1000") == []


def test_an_index_without_states_names_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(str(write_embeddings(tmp_path / "e" / "a.parquet", unit(3))), str(tmp_path / "i"), load_config("micro"))
    assert main(["search", "apple", "--rerank", "--index", str(tmp_path / "i")]) == 2
    shown = capsys.readouterr().err
    assert "has no chorus states" in shown and "run crem embed with embed.states=true --fresh" in shown
