"""``crem search --rerank``, ``--html`` and ``crem answer`` by the command line, on items that are embedded once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import crem
from crem.cli import main
from crem.config import ImageAccess, load_config
from pipelines.embedding.embed import embed
from pipelines.search.hit_pictures import HitPictures
from pipelines.search.hits_page import hits_page
from pipelines.search.index import build
from pipelines.search.index_text import source_line
from pipelines.search.opened_index import Hit
from pipelines.search.search import Query
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


@pytest.mark.ray
def test_answers_come_from_the_stored_memories_alone(items: Embedded, capsys: pytest.CaptureFixture[str]) -> None:
    model, question = crem.load(items.model), "what is this?"
    contents = [*(items.picture(n) for n in range(PICTURES)), "a <b>red</b> apple"]
    memories = model.remember(contents, dtype="bf16")
    expected = model.answer_memories(memories, [question] * len(contents), max_new_tokens=8)
    query = items.folder / "query.png"
    query.write_bytes(items.picture(3).read_bytes())
    words = ["--image", str(query), "--index", items.index, "--max-tokens", "8"]
    kept = (items.folder / "items").rename(items.folder / "away")
    try:
        (nearest,) = run(capsys, "answer", question, *words)
        every = run(capsys, "answer", question, *words, "-k", "9", "--rerank")
        some = run(capsys, "answer", question, *words, "-k", "2", "--where", "price > 5 AND price < 80")
        assert main(["answer", question, *words, "-k", "9", "--rerank"]) == 0
        streamed = capsys.readouterr().out
    finally:
        kept.rename(items.folder / "items")
    assert nearest["source"]["id"] == "p3" and nearest["source"]["uri"] == "p3.png"
    assert nearest["source"]["score"] == pytest.approx(1, abs=1e-4)
    of = {f"p{n}" if n < PICTURES else "t": answer for n, answer in enumerate(expected)}
    assert len(every) == 9 and {a["source"]["id"]: a["answer"] for a in every} == {i: a.text for i, a in of.items()}
    assert len({answer["answer"] for answer in every}) > 1, "they depend on the memory"
    assert nearest["answer"] == of["p3"].text and nearest["completion_tokens"] == of["p3"].completion_tokens
    assert {answer["source"]["id"] for answer in some} == {"p6", "p7"}
    for rank, answer in enumerate(every, 1):
        source = answer["source"]
        assert f"{rank:>3}  {source['score']:+.4f}  {source['uri'] or source['text']}" in streamed
        assert f"id={source['id']}\n     {answer['answer']}\n" in streamed
    own = model.generate_compressed(contents, question, max_new_tokens=8)
    assert sum(a == of[i].text for a, i in zip(own, of, strict=True)) >= 7, "bf16 rounds"

    assert run(capsys, "answer", question, "--find", "apple", "--hybrid", "--index", items.index)
    assert main(["answer", question, *words, "--where", "price > 1000"]) == 0
    assert "no item meets the condition" in capsys.readouterr().err
    for wrong, message in (([" "], "there is no question"), ([question, "--max-tokens", "0"], "leaves no room")):
        assert main(["answer", *wrong, "--index", items.index]) == 2
        assert message in capsys.readouterr().err


def test_an_index_without_states_or_memories_names_the_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(str(write_embeddings(tmp_path / "e" / "a.parquet", unit(3))), str(tmp_path / "i"), load_config("micro"))
    assert main(["search", "apple", "--rerank", "--index", str(tmp_path / "i")]) == 2
    shown = capsys.readouterr().err
    assert "has no chorus states" in shown and "run crem embed with embed.states=true --fresh" in shown
    assert main(["answer", "what is this?", "--index", str(tmp_path / "i")]) == 2
    shown = capsys.readouterr().err
    assert "has no chorus memories" in shown and "run crem embed with embed.memory=bf16 --fresh" in shown


@pytest.mark.ray
def test_the_page_shows_pictures_texts_and_what_cannot_be_read(
    items: Embedded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "hits.html"
    search = ["search", "--image", str(items.picture(3)), "--index", items.index, "-k", "9"]
    gone, cut = items.picture(5), items.picture(6)
    kept = {path: path.read_bytes() for path in (gone, cut)}
    gone.unlink()
    cut.write_bytes(b"<script>")
    try:
        found = run(capsys, *search, "--html", str(page))
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
    assert len(found) == 9, "the hits are there without their pictures"
    shown = page.read_text(encoding="utf-8")
    assert shown.count('<img src="data:image/png;base64,') == 1 + PICTURES - 2
    assert "image_missing: &#39;p5.png&#39; does not exist in the corpus folder" in shown
    assert "image_corrupt: 8 bytes that are not an image" in shown
    assert "a &lt;b&gt;red&lt;/b&gt; apple" in shown and "<b>red" not in shown and "<script" not in shown
    for hit in found:
        assert f"<dt>id</dt><dd>{hit['id']}</dd>" in shown and f"{hit['score']:.4f}" in shown
    assert 'src="http' not in shown and 'href="' not in shown, "it loads nothing"
    assert main([*search, "--html", str(tmp_path / "nowhere" / "hits.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main([*search, "--html", "s3://bucket/hits.html"]) == 2
    assert "give a file on this machine" in capsys.readouterr().err


def test_pictures_are_read_only_where_it_is_allowed(tmp_path: Path) -> None:
    items, elsewhere = tmp_path / "items", tmp_path / "elsewhere"
    items.mkdir()
    elsewhere.mkdir()
    write_rows(items / "rows.jsonl", [{"text": "a"}])
    (elsewhere / "a.png").write_bytes(encoded(random_image(1)))
    hits = [
        Hit(0, 1.0, uri, None) for uri in (str(elsewhere / "a.png"), "../elsewhere/a.png", "http://127.0.0.1/a.png")
    ]
    limits = load_config("micro").model.image
    pictures = HitPictures(str(items / "rows.jsonl"), limits, ImageAccess())
    assert [found.missing.partition(":")[0] for found in map(pictures, hits) if found] == ["uri_refused"] * 3
    allowed = HitPictures(str(items / "rows.jsonl"), limits, ImageAccess(image_roots=[str(elsewhere)]))(hits[0])
    assert allowed is not None and allowed.url.startswith("data:image/png") and allowed.size == "24 x 20"
    no_uri = pictures(Hit(0, 1.0, None, None))
    assert no_uri is not None and "the item has no uri" in no_uri.missing
    assert pictures(Hit(0, 1.0, None, "a text")) is None
    for source, reason in ((None, "does not say where"), (str(tmp_path / "gone"), "does not exist")):
        missing = HitPictures(source, limits, ImageAccess())(hits[0])
        assert missing is not None and reason in missing.missing


def test_a_page_shows_a_hundred_hits_and_says_how_many_there_are(tmp_path: Path) -> None:
    build(str(write_embeddings(tmp_path / "e" / "a.parquet", unit(3))), str(tmp_path / "i"), load_config("micro"))
    hits = [Hit(f"id-{n}", 1.0, None, f"text {n}") for n in range(1200)]
    page = hits_page(str(tmp_path / "i"), Query("what"), hits, load_config("micro"))
    assert page.count('<div class="hit">') == 100 and "id-99" in page and "id-100" not in page
    assert "<b>1,200</b><span>hits<br>the first 100 are shown" in page


def test_a_line_of_a_hit_is_one_line_that_a_terminal_does_not_obey() -> None:
    hit = Hit("a\x1b[2Jb", 0.5, None, "one\ntwo\x1b[31m " + "x" * 500, {"kept": "c\rd"})
    line = source_line(7, hit)
    assert line.startswith("  7  +0.5000  one two [31m xxx") and line.endswith("   kept=c d   id=a [2Jb")
    assert line.isprintable() and len(line) < 300 and "characters]" in line
