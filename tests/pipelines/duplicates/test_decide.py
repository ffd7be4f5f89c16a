"""Decisions on whole tables: planted duplicates, an oracle of all pairs, contamination, languages, determinism."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from crem.config import PrepareConfig
from crem.errors import ConfigError, ResourceError
from pipelines.duplicates import components, near_items
from pipelines.duplicates import decide as deciding
from pipelines.duplicates.components import components as components_of
from pipelines.duplicates.decide import check_settings, decide
from pipelines.duplicates.decision_tables import read_clusters
from pipelines.duplicates.image_signature import ImageRelation, image_signature
from pipelines.duplicates.record_shuffle import shuffled
from pipelines.duplicates.text_signature import is_typing_error, normal_form, typing_keys
from pipelines.tables import ray_tasks
from pipelines.tables.manifest import PrepareManifest
from pipelines.tables.storage import Folder
from tests.pipelines.duplicates.planted import COPIES, Tables, all_decisions, connected, decided, left_out, photo, png

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
SENTENCE = "A photograph of the harbour at night, seen from the lighthouse on the hill"
EXACT, NEAR = "duplicates/exact_duplicate", "duplicates/near_duplicate"


def test_exact_duplicates(tmp_path: Path) -> None:
    t = Tables()
    picture = png(photo(1))
    t.add(t.item("what is it?", picture), t.item("a cat"))
    again = t.add(t.item("what is it?", picture), t.item("a cat"))
    t.add(t.item("what is it?", picture), t.item("a dog"))  # one picture in many rows is no duplicate
    t.add(t.item("what is it?", png(photo(2))), t.item("a cat"))  # nor is one answer
    t.add(t.item("What is it", picture), t.item("a cat"))  # nearly the same
    t.add(t.item("what is it?", picture), t.item("a cat"), question="q", answer="a")
    t.add(t.item("what is it?", picture, instruction="look"), t.item("a cat"))
    t.add(t.item("what is it?", picture), None, question="q", answer="a")
    found = decided(t, tmp_path, exact_duplicates="drop")
    assert left_out(found) == {again: EXACT}
    assert found.found == found.left_out == {EXACT: 1} and found.clusters == 1
    (decision,) = all_decisions(found).to_pylist()
    assert decision["detail"] == "same as row 's/0'" and decision["cluster"] == t.rows[0]["id"]


def test_reports_leave_all_rows(tmp_path: Path) -> None:
    t = Tables()
    for _ in range(20):
        t.add(t.item("q"), t.item("t"))
    found = decided(t, tmp_path)
    assert left_out(found) == {} and found.left_out == {} and found.found == {EXACT: 19}
    (cluster,) = read_clusters(found.folder, 5).to_pylist()
    assert cluster["size"] == 20 and cluster["left_out"] == 0 and cluster["reason"] == "exact_duplicate"
    assert cluster["names"] == [f"s/{i}" for i in range(8)] and cluster["ids"] == [r["id"] for r in t.rows[:8]]


@pytest.mark.parametrize("copy", COPIES)
def test_a_copied_picture_makes_a_near_duplicate(copy: str, tmp_path: Path) -> None:
    t = Tables()
    expected = {}
    for seed in range(6):
        t.add(t.item(None, png(photo(seed))), t.item(f"picture {seed}"))
        expected[t.add(t.item(None, COPIES[copy](photo(seed))), t.item(f"Picture {seed}!"))] = NEAR
        t.add(t.item(None, COPIES[copy](photo(seed))), t.item(f"another text {seed}"))
    found = decided(t, tmp_path, near_duplicates="drop")
    assert left_out(found) == expected
    clusters = read_clusters(found.folder, 100).to_pylist()
    assert sorted((c["kind"], c["size"]) for c in clusters) == [("images", 2)] * 6 + [("rows", 2)] * 6


def test_texts_with_small_changes(tmp_path: Path) -> None:
    long = " ".join(f"{word} {i}" for i, word in enumerate(SENTENCE.split() * 8))
    t = Tables()
    t.add(t.item(SENTENCE), t.item("one"))
    near = [
        t.add(t.item(text), t.item("One."))
        for text in (SENTENCE.upper(), SENTENCE.replace(",", " -"), SENTENCE.replace("lighthouse", "lihgthouse"))
    ]
    t.add(t.item(SENTENCE.replace("night", "dawn")), t.item("one"))
    t.add(t.item(SENTENCE.replace("hill", "hull")), t.item("one"))
    t.add(t.item(long), t.item("two"))
    near.append(t.add(t.item(long.replace("harbour 18", "port 18")), t.item("two")))
    t.add(t.item(long[::-1]), t.item("two"))
    assert left_out(decided(t, tmp_path, near_duplicates="drop")) == dict.fromkeys(near, NEAR)


@pytest.mark.parametrize("shuffled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_decisions_agree_with_a_comparison_of_all_pairs(
    shuffled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shuffled:
        monkeypatch.setattr(near_items, "_RECORDS_PER_BUCKET", 1000)
        monkeypatch.setattr(deciding, "_ROWS_PER_BUCKET", 100)
        monkeypatch.setattr(deciding, "_ROWS_HERE", 0)
    rng = np.random.default_rng(5)
    t = Tables()
    pictures = [png(photo(seed)) for seed in range(40)]
    pictures += [make(photo(seed)) for seed in range(25) for make in COPIES.values()]
    texts = [
        f"{w} of the {p}" for w in ("photograph", "photogrpah", "drawing", "Drawing") for p in ("harbour", "market")
    ]
    for _ in range(500):
        t.add(t.item(None, pictures[rng.integers(len(pictures))]), t.item(texts[rng.integers(len(texts))]))

    images = list(t.images.values())
    signatures = np.array([image_signature(i["bytes"], i["width"], i["height"]) for i in images])
    relation = ImageRelation(6)
    roots = connected(len(images), lambda i, j: bool(relation.near(signatures, np.array([i]), np.array([j]))[0]))
    image_root = {image["id"]: root for image, root in zip(images, roots, strict=True)}
    normal = sorted({normal_form(text) for text in texts})
    text_roots = connected(len(normal), lambda i, j: _one_typing_error(normal[i], normal[j]))
    text_root = dict(zip(normal, text_roots, strict=True))
    expected: dict[int, str] = {}
    seen: dict[tuple[int, int], set[str]] = {}
    for row in t.rows:
        contents = seen.setdefault(
            (image_root[row["query"]["images"][0]], text_root[normal_form(row["target"]["text"])]), set()
        )
        content = repr((row["query"], row["target"]))
        if contents:
            expected[row["id"]] = EXACT if content in contents else NEAR
        contents.add(content)
    found = decided(t, tmp_path, 70, near_duplicates="drop")
    assert left_out(found) == expected
    assert len(set(roots)) == 40 and len(set(text_roots)) == 4 and 150 < len(expected) < 450


def _one_typing_error(a: str, b: str) -> bool:
    words = [(x, y) for x, y in zip(a.split(), b.split(), strict=True) if x != y]
    return len(words) == 1 and is_typing_error(*words[0]) and bool(typing_keys(a))


def test_rows_for_evaluation_stay_and_those_for_training_give_way(tmp_path: Path) -> None:
    t = Tables()
    train = t.add(t.item("q"), t.item("t"))
    t.add(t.item("q"), t.item("t"), split="test_x")
    t.add(t.item("q"), t.item("t"), split="test_y")
    found = decided(t, tmp_path, exact_duplicates="drop")
    assert left_out(found) == {train: EXACT} and found.found == {EXACT: 2}
    assert all_decisions(found)["detail"].to_pylist() == ["same as row 's/1'"]


def test_a_repeated_id_is_no_duplicate(tmp_path: Path) -> None:
    """``ids`` rejects the second row; a decision by id would take the first with it."""
    t = Tables()
    t.add(t.item("q"), t.item("t"), key="k")
    t.add(t.item("q"), t.item("t"), key="k")
    other = t.add(t.item("q"), t.item("t"), key="other")
    assert left_out(decided(t, tmp_path, exact_duplicates="drop")) == {other: EXACT}


def evaluation_set(folder: Path, tables: Tables) -> str:
    """Finished tables."""
    tables.parts(folder)
    splits = {f"{row['split']}/t": 1 for row in tables.rows}
    PrepareManifest(
        rows_in=len(tables.rows),
        rows_out=len(tables.rows),
        rejected=0,
        images=len(tables.images),
        by_reason={},
        by_split_task=splits,
        source_uri="x",
        created_with={},
        config={},
    ).write(Folder.at(folder))
    return str(folder)


@pytest.mark.parametrize("action", ["drop", "report"])
def test_rows_of_an_evaluation_set(action: str, tmp_path: Path) -> None:
    e = Tables("evaluation")
    e.add(e.item("what is it?", png(photo(1))), e.item("a cat"), split="test")
    e.add(e.item(SENTENCE), e.item(None, png(photo(2))), split="test")
    e.add(e.item("capital of France"), e.item("Paris"), split="test")
    e.add(e.item("only trained on", png(photo(3))), e.item("x"), split="train")
    uri = evaluation_set(tmp_path / "evaluation", e)
    t = Tables()
    same = t.add(t.item("something else", png(photo(1))), t.item("y"))
    copy = t.add(t.item("something"), t.item(None, COPIES["q50"](photo(2))))
    text = t.add(t.item(SENTENCE.upper().replace("LIGHTHOUSE", "LIHGTHOUSE")), t.item("z"))
    row = t.add(t.item("Capital of France?"), t.item("paris"))
    t.add(t.item("Capital of France?"), t.item("a city"))  # short texts prove nothing
    t.add(t.item("what is it?", png(photo(7))), t.item("a cat"))  # nor do texts beside an image
    t.add(t.item("q", png(photo(3))), t.item("t"))  # not an evaluation split
    t.add(t.item("something else", png(photo(1))), t.item("y"), split="test")  # not trained on
    found = decided(t, tmp_path, contamination=(uri,), contaminated=action)
    counts = {
        "contamination/evaluation_image": 2,
        "contamination/evaluation_row": 1,
        "contamination/evaluation_text": 1,
    }
    assert found.found == counts | ({EXACT: 1} if action == "report" else {})
    expected = {same: "image", copy: "image", text: "text", row: "row"} if action == "drop" else {}
    assert left_out(found) == {i: f"contamination/evaluation_{what}" for i, what in expected.items()}
    assert found.left_out == (counts if action == "drop" else {})
    assert all(uri in detail for detail in all_decisions(found)["detail"].to_pylist())


def test_an_image_of_the_evaluation_set_counts_in_all_its_copies(tmp_path: Path) -> None:
    e = Tables("evaluation")
    e.add(e.item(None, png(photo(1))), e.item("a"), split="test")
    t = Tables()
    ids = [t.add(t.item(None, make(photo(1))), t.item(f"text {name}")) for name, make in COPIES.items()]
    t.add(t.item(None, png(photo(2))), t.item("text"))
    found = decided(t, tmp_path, contamination=(evaluation_set(tmp_path / "e", e),))
    assert left_out(found) == dict.fromkeys(ids, "contamination/evaluation_image")


def test_languages(tmp_path: Path) -> None:
    t = Tables()
    t.add(t.item("A small boat is moored beside the bridge."), t.item("boat"))
    german = t.add(t.item("Ein kleines Boot liegt neben der alten Steinbrücke."), t.item("boat"))
    again = t.add(t.item("Ein kleines Boot liegt neben der alten Steinbrücke."), t.item("boat"))
    found = decided(t, tmp_path, languages=("en",), exact_duplicates="drop")
    assert left_out(found) == dict.fromkeys([german, again], "language/other_language")
    assert found.found == {"language/other_language": 2}


def planted_tables() -> Tables:
    t = Tables()
    for seed in range(60):
        for text in (f"Photograph of place {seed % 7}", f"photograph of place {seed % 7}"):
            t.add(t.item(None, png(photo(seed % 40))), t.item(text))
            t.add(t.item(None, COPIES["q50"](photo(seed % 40))), t.item(text))
    return t


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def in_shuffles(monkeypatch: pytest.MonkeyPatch, ids_per_cpu: int) -> None:
    """As a corpus of many rows would be decided on."""
    monkeypatch.setattr(near_items, "_RECORDS_PER_BUCKET", 2000)
    monkeypatch.setattr(deciding, "_ROWS_PER_BUCKET", 100)
    monkeypatch.setattr(deciding, "_ROWS_HERE", 0)
    monkeypatch.setattr(ray_tasks, "_IDS_PER_CPU", ids_per_cpu)


@pytest.mark.slow
@pytest.mark.parametrize("ids_per_cpu", [10**6, 100])
def test_shuffles_decide_as_the_driver_does(ids_per_cpu: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = decided(planted_tables(), tmp_path / "here", near_duplicates="drop")
    in_shuffles(monkeypatch, ids_per_cpu)
    there = decided(planted_tables(), tmp_path / "shuffled", near_duplicates="drop")
    assert left_out(here) == left_out(there) and len(left_out(here)) == 180
    assert (here.found, here.left_out, here.clusters) == (there.found, there.left_out, there.clusters)
    clusters = [read_clusters(of.folder).to_pylist() for of in (here, there)]
    assert clusters[0] == clusters[1] and len(clusters[0]) == 100
    found_by = {path.name for path in (tmp_path / "shuffled" / "work" / "duplicates").rglob("*.parquet")}
    assert (len(found_by) > 1) == (ids_per_cpu == 100)
    assert not list((tmp_path / "shuffled").rglob("*.arrow")), "the records go when they are no longer needed"


def test_an_interrupted_decision_does_not_read_the_corpus_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shuffles(monkeypatch, 10**6)
    t = Tables()
    for i in range(300):
        t.add(t.item("q"), t.item(f"t {i % 100}"))

    def interrupted(*args: Any) -> None:
        next(shuffled(*args))  # the records are written, nothing is grouped
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deciding, "shuffled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decided(t, tmp_path, exact_duplicates="drop")
    for path in (tmp_path / "tables").rglob("*.parquet"):
        path.unlink()
    rows, images = t.parts(tmp_path / "elsewhere")
    nowhere = [replace(part, folder=Folder.at(tmp_path / "tables/rows")) for part in rows]
    found = decide(nowhere, images, PrepareConfig(exact_duplicates="drop"), work=Folder.at(tmp_path / "work"))
    assert found.left_out == {EXACT: 200}
    assert left_out(found) == {row["id"]: EXACT for row in t.rows[100:]}


@pytest.mark.slow
def test_the_same_bytes_whatever_the_order_of_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_items, "_RECORDS_PER_BUCKET", 500)
    monkeypatch.setattr(deciding, "_ROWS_PER_BUCKET", 50)
    monkeypatch.setattr(deciding, "_ROWS_HERE", 0)
    context = ray.data.DataContext.get_current()
    limits = context.execution_options.resource_limits
    found = []
    for cpus in (1, 4):
        context.execution_options.resource_limits = limits.copy(cpu=cpus)
        found.append(decided(planted_tables(), tmp_path / str(cpus), 13, near_duplicates="drop"))
    context.execution_options.resource_limits = limits
    one, four = (files(tmp_path / str(cpus) / "work") for cpus in (1, 4))
    assert one == four and len(one) > 10 and sum(found[0].left_out.values()) == 180


def test_staged_files_give_the_same_decisions(tmp_path: Path) -> None:
    parquet, arrow = (
        decided(planted_tables(), tmp_path / kind, 50, kind, near_duplicates="drop") for kind in ("parquet", "arrow")
    )
    assert left_out(parquet) == left_out(arrow) != {}


def test_copies_of_one_picture_by_the_thousand(tmp_path: Path) -> None:
    """Every copy is another file, and they all share their keys: a cluster is a star, and nothing is forgotten."""
    t = Tables()
    blank = Image.new("RGB", (40, 40), "white")
    for i in range(1500):
        image = blank.copy()
        image.putpixel((i % 40, i // 40), (254, 255, 255))
        t.add(t.item(None, png(image)), t.item("blank"))
    t.add(t.item(None, png(photo(1))), t.item("blank"))
    found = decided(t, tmp_path, 400, near_duplicates="drop")
    assert len(t.images) == 1501 and found.left_out == {NEAR: 1499} and found.unchecked == 0
    assert {c["size"] for c in read_clusters(found.folder, 5).to_pylist()} == {1500}


def test_more_pairs_than_the_driver_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "MAX_PAIRS", 2)
    with pytest.raises(
        ResourceError, match="3 near pairs are over the limit of 2; make prepare.near_image_bits smaller"
    ):
        components_of(np.array([1, 2, 3]), np.array([2, 3, 4]))


def test_components() -> None:
    found = components_of(np.array([9, -5, 4, 30]), np.array([4, 12, 7, 30]))
    assert [found.of(i) for i in (4, 7, 9, -5, 12, 30, 1)] == [4, 4, 4, -5, -5, 30, 1]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_settings(PrepareConfig(near_duplicates="drop", languages=("en",)))
    for name in ("imagehash", "rensa", "py3langid.langid"):
        monkeypatch.setitem(sys.modules, name, None)
    check_settings(PrepareConfig())
    with pytest.raises(ConfigError, match=r"prepare.near_duplicates needs .*'imagehash'.*pip install 'crem\[curate\]'"):
        check_settings(PrepareConfig(near_duplicates="report"))
    with pytest.raises(ConfigError, match=r"prepare.contamination needs .*'imagehash'"):
        check_settings(PrepareConfig(contamination=("/nowhere",)))


def test_evaluation_sets_must_be_prepared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no completed prepared tables"):
        check_settings(PrepareConfig(contamination=(str(tmp_path),)))


def test_nothing_is_written_where_nothing_is_found(tmp_path: Path) -> None:
    t = Tables()
    t.add(t.item("q"), t.item("t"))
    found = decided(t, tmp_path, near_duplicates="drop", exact_duplicates="drop")
    assert files(tmp_path / "work") == {} and found.found == {} and all_decisions(found).num_rows == 0
    assert read_clusters(found.folder, 3).num_rows == 0


def test_no_rows_no_decisions(tmp_path: Path) -> None:
    found = decided(Tables(), tmp_path, near_duplicates="drop")
    assert found.found == {} and all_decisions(found).num_rows == 0


def test_files_are_of_their_schema(tmp_path: Path) -> None:
    decided(planted_tables(), tmp_path, near_duplicates="drop")
    names = [path for path in (tmp_path / "work").rglob("*.parquet") if "clusters" not in path.parts]
    assert {tuple(pq.read_schema(name).names) for name in names} == {("id", "stage", "reason", "detail", "cluster")}
