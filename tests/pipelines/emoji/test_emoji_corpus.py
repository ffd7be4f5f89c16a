"""The embedded corpus: no test content in training, sound rows and images, and the script that made it."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from crem.errors import CremError
from pipelines.emoji import corpus_path
from pipelines.emoji.concepts import (
    ADDED_VENDORS,
    CORE_VENDORS,
    PACKAGES,
    VENDORS,
    Concept,
    hold_out,
    normal_code,
)
from pipelines.emoji.corpus_rows import (
    CAPTION_QUESTION,
    GROUP_QUESTION,
    QUESTIONS,
    TRAIN_VENDORS,
    UNSEEN_VENDOR,
    evaluation_rows,
    training_rows,
)
from pipelines.emoji.draw_corpus import SEED, SHA256, SIDE_PIXELS, build, main, render

MAX_CORPUS_BYTES = 15_000_000
MAX_TRAIN_ROWS = 150_000
Row = dict[str, Any]


@pytest.fixture(scope="module")
def corpus() -> Path:
    return Path(corpus_path())


@pytest.fixture(scope="module")
def rows(corpus: Path) -> list[Row]:
    return [row for path in sorted((corpus / "rows").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def train(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["split"] == "train"]


@pytest.fixture(scope="module")
def test(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["split"] != "train"]


@pytest.fixture(scope="module")
def listed(corpus: Path) -> dict[str, dict[str, str]]:
    """``concepts.csv`` by hexcode."""
    with (corpus / "concepts.csv").open(encoding="utf-8", newline="") as file:
        return {line["hexcode"]: line for line in csv.DictReader(file)}


@pytest.fixture(scope="module")
def held_out(listed: dict[str, dict[str, str]]) -> set[str]:
    return {code for code, line in listed.items() if line["held_out"] == "1"}


@pytest.fixture(scope="module")
def images(corpus: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(corpus / "images.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def drawn(images: dict[str, bytes]) -> dict[str, set[str]]:
    """Training vendor -> codes of the concepts that the corpus has its drawing of."""
    return {v: {_code(name) for name in images if Path(name).parent.name == v} for v in TRAIN_VENDORS}


def _images_of(rows: list[Row]) -> set[str]:
    return {name for row in rows for side in ("query_images", "target_images") for name in row[side]}


def _code(image: str) -> str:
    return Path(image).stem


# ---- what training must not see -------------------------------------------------------------------------------------


def test_training_has_no_held_out_concept(train: list[Row], held_out: set[str], listed: dict) -> None:
    assert held_out
    assert not {_code(name) for name in _images_of(train)} & held_out
    assert not {row["key"].split("/")[2] for row in train} & held_out
    labels = {listed[code]["label"] for code in held_out}
    assert not {row[side] for row in train for side in ("query_text", "target_text")} & labels


def test_training_has_no_drawing_of_the_unseen_vendor(train: list[Row]) -> None:
    assert {Path(name).parent.name for name in _images_of(train)} == set(TRAIN_VENDORS)


def test_training_shares_no_image_bytes_with_what_it_must_not_see(
    train: list[Row], held_out: set[str], images: dict[str, bytes]
) -> None:
    hidden = {data for name, data in images.items() if name.startswith(UNSEEN_VENDOR) or _code(name) in held_out}
    assert not [name for name in _images_of(train) if images[name] in hidden]


def test_splits_hold_what_their_names_say(test: list[Row], held_out: set[str], listed: dict) -> None:
    assert {row["split"] for row in test} == {"test_vendor", "test_concept"}
    for row in test:
        codes = {_code(name) for name in _images_of([row])}
        assert len(codes) == 1
        assert (codes <= held_out) == (row["split"] == "test_concept"), row["key"]
        assert any(name.startswith(UNSEEN_VENDOR) for name in _images_of([row])), row["key"]
        assert {row["query_text"], row["target_text"]} <= {None, listed[codes.pop()]["label"]}


def test_one_concept_in_ten_is_held_out_of_every_group(held_out: set[str], listed: dict) -> None:
    sizes = Counter(line["group"] for line in listed.values())
    kept_out = Counter(listed[code]["group"] for code in held_out)
    assert {group: kept_out[group] for group in sizes} == {group: round(0.1 * size) for group, size in sizes.items()}


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_every_row_has_a_key_of_its_own(rows: list[Row]) -> None:
    repeated = [key for key, count in Counter(row["key"] for row in rows).items() if count > 1]
    assert not repeated


def test_counts(rows: list[Row], listed: dict, held_out: set[str], drawn: dict[str, set[str]]) -> None:
    counts = Counter((row["split"], row["task"]) for row in rows)
    drawings = sum(len(codes - held_out) for codes in drawn.values())
    assert (len(listed), len(held_out)) == (1594, 159)  # whatever vendors are added
    assert sum(count for (split, _), count in counts.items() if split == "train") < MAX_TRAIN_ROWS
    assert 3.5 * drawings <= counts["train", "text_to_image"] <= 4 * drawings  # tags alone are often ambiguous
    assert 4.5 * drawings <= counts["train", "image_to_text"] <= 5 * drawings
    assert 2.8 * drawings <= counts["train", "image_to_image"] <= 3 * drawings  # some concepts have two other drawings
    assert 1.5 * drawings <= counts["train", "caption"] <= 2 * drawings
    for task in ("text_to_image", "image_to_text", "image_to_image"):
        assert counts["test_vendor", task] == len(listed) - len(held_out)
        assert counts["test_concept", task] == len(held_out)
    assert sum(counts.values()) == len(rows)


def test_tasks_have_the_sides_they_name(rows: list[Row]) -> None:
    sides = {"text_to_image": "ti", "image_to_text": "it", "image_to_image": "ii", "caption": "i-"}
    for row in rows:
        found = ""
        for side in ("query", "target"):
            text, images = row[f"{side}_text"], row[f"{side}_images"]
            assert not (text and images), row["key"]
            found += "t" if text else "i" if images else "-"
        assert found == sides[row["task"]], row["key"]


def test_texts_are_clean_and_short(rows: list[Row]) -> None:
    for row in rows:
        for column in ("query_text", "target_text", "question", "answer"):
            text = row[column]
            assert text is None or (text and text == text.strip() and len(text) <= 80), (row["key"], column, text)


def test_every_drawing_is_the_query_of_up_to_three_others_of_its_concept(
    train: list[Row], held_out: set[str], drawn: dict[str, set[str]]
) -> None:
    targets = defaultdict(list)
    for row in train:
        if row["task"] == "image_to_image":
            (query,), (target,) = row["query_images"], row["target_images"]
            assert _code(query) == _code(target)
            targets[query].append(Path(target).parent.name)
    vendors_of = Counter(code for codes in drawn.values() for code in codes - held_out)
    assert targets.keys() == {f"{v}/{code}.webp" for v, codes in drawn.items() for code in codes - held_out}
    for query, others in targets.items():
        assert Path(query).parent.name not in others
        assert len(others) == len(set(others)) == min(3, vendors_of[_code(query)] - 1), query
    chosen = Counter(vendor for others in targets.values() for vendor in others)
    for vendor in TRAIN_VENDORS:  # by chance, not always the first of the list
        assert 2 <= chosen[vendor] / len(drawn[vendor] - held_out) <= 4, (vendor, chosen)


def test_tags_alone_name_one_concept(train: list[Row], listed: dict) -> None:
    words = {code: {line["label"], *line["tags"].split("|")} for code, line in listed.items()}
    tagged = [row for row in train if row["task"] == "text_to_image" and "/tags/" in row["key"]]
    assert len(tagged) > len(listed)
    for row in tagged:
        tags = set(row["query_text"].split(", "))
        meant = [code for code, known in words.items() if tags <= known]
        assert meant == [_code(row["target_images"][0])], row["query_text"]


def test_all_drawings_and_some_texts_have_a_question_and_half_are_about_the_group(
    train: list[Row], listed: dict
) -> None:
    pairs = [row for row in train if row["task"] != "caption" and row["question"]]
    unquestioned = [row for row in train if not row["question"]]
    assert {row["task"] for row in unquestioned} == {"text_to_image"}
    assert len(unquestioned) < 0.8 * sum(row["task"] == "text_to_image" for row in train)
    kind_of = {wording: kind for kind, wordings in QUESTIONS.items() for wording in wordings}
    kinds = Counter()
    for row in pairs:
        kind, concept = kind_of[row["question"]], listed[row["key"].split("/")[2]]
        kinds[kind] += 1
        if kind == "tag":
            assert row["answer"] in concept["tags"].split("|")
        elif kind == "describe":
            assert row["answer"].startswith(concept["label"] + ": ")
        else:
            assert row["answer"] == concept[kind], row["key"]
    assert kinds.keys() == QUESTIONS.keys()
    assert 0.45 <= kinds["group"] / len(pairs) <= 0.7


def test_captions_have_no_target_and_other_tags_than_the_pairs(train: list[Row]) -> None:
    in_pairs = defaultdict(set)
    for row in train:
        if "/label_and_tags/" in row["key"]:
            text = row["query_text"] or row["target_text"]
            in_pairs[row["key"].split("/")[2]].update(text.rpartition(": ")[2].split(", "))
    captions = [row for row in train if row["task"] == "caption"]
    assert {row["question"] for row in captions} == {CAPTION_QUESTION}
    for row in captions:
        _, _, code, kind = row["key"].split("/")
        if kind == "tags":
            assert not set(row["answer"].rpartition(": ")[2].split(", ")) & in_pairs[code], row["key"]


def test_the_evaluated_question_and_the_share_of_its_commonest_answer(test: list[Row], listed: dict) -> None:
    for split in ("test_vendor", "test_concept"):
        questions = [row for row in test if row["split"] == split and row["question"]]
        assert {(row["task"], row["question"]) for row in questions} == {("image_to_text", GROUP_QUESTION)}
        assert all(row["answer"] == listed[_code(row["query_images"][0])]["group"] for row in questions)
        answers = Counter(row["answer"] for row in questions)
        assert len(answers) == 9
        assert 0.15 < max(answers.values()) / len(questions) < 0.25  # score of always naming the commonest group


# ---- images and files -----------------------------------------------------------------------------------------------


def test_core_vendors_draw_every_concept_and_added_ones_many_that_training_may_see(
    images: dict[str, bytes], listed: dict, held_out: set[str]
) -> None:
    drawn = defaultdict(set)
    for name in images:
        drawn[Path(name).parent.name].add(_code(name))
    assert drawn.keys() == set(VENDORS)
    for vendor in CORE_VENDORS:
        assert drawn[vendor] == listed.keys()
    for vendor in ADDED_VENDORS:
        assert drawn[vendor] <= listed.keys() - held_out
        assert len(drawn[vendor]) > 700, vendor
        shown = Counter(images[f"{vendor}/{code}.webp"] for code in drawn[vendor])
        assert max(shown.values()) == 1, f"{vendor} draws two concepts alike"


def test_names_of_the_added_vendors_are_codes_of_concepts(listed: dict) -> None:
    with (Path(corpus_path()).parent / "names.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["vendor"] for line in lines} <= ADDED_VENDORS.keys()
    assert {line["hexcode"] for line in lines} <= listed.keys()
    for column in ("name", "hexcode"):
        repeated = [k for k, n in Counter((line["vendor"], line[column]) for line in lines).items() if n > 1]
        assert not repeated


def test_every_image_decodes_and_shows_something(images: dict[str, bytes]) -> None:
    for name, data in images.items():
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (SIDE_PIXELS, SIDE_PIXELS)), name
        darkest = min(low for low, _ in image.getextrema())
        assert darkest < 250, f"{name} is blank"


def test_rows_use_every_image_and_no_other(rows: list[Row], images: dict[str, bytes], held_out: set[str]) -> None:
    unused = {f"fluent/{code}.webp" for code in held_out}  # neither trained on nor a query
    assert _images_of(rows) == images.keys() - unused


def test_the_corpus_is_small(corpus: Path) -> None:
    assert sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file()) < MAX_CORPUS_BYTES


def test_every_source_is_credited(corpus: Path) -> None:
    text = (corpus / "LICENSES.md").read_text(encoding="utf-8")
    for package, version in PACKAGES.items():
        assert f"`{package}` {version}" in text
    for needed in (
        "Emoji artwork is provided by Emojitwo",
        "Copyright 2015, Mozilla Foundation",
        "Copyright Twitter, Inc and other contributors. Graphics licensed under CC-BY 4.0",
        "https://creativecommons.org/licenses/by/4.0/",
        "Copyright (c) Microsoft Corporation",
        "Copyright (c) 2017-2019 Miles Johnson",
        "Permission is hereby granted, free of charge",
        "Apache License, Version 2.0",
        "UNICODE LICENSE V3",
    ):
        assert needed in text


# ---- the script that made it ----------------------------------------------------------------------------------------


def test_shipped_rows_are_those_the_code_makes(
    rows: list[Row], listed: dict, held_out: set[str], drawn: dict[str, set[str]]
) -> None:
    concepts = [
        Concept(c["hexcode"], c["label"], tuple(filter(None, c["tags"].split("|"))), c["group"], c["subgroup"])
        for c in listed.values()
    ]
    made = [*training_rows(concepts, held_out, SEED, drawn), *evaluation_rows(concepts, held_out)]
    assert sorted(made, key=lambda row: row["key"]) == sorted(rows, key=lambda row: row["key"])


def test_codes_are_compared_without_variation_selectors() -> None:
    assert normal_code("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    assert normal_code("1F600") == "1f600"


def test_hold_out_takes_its_share_of_each_group_and_spares_the_kept() -> None:
    concepts = [Concept(f"{g}{i:02}", f"{g}{i}", (), g, "s") for g in "ab" for i in range(20)]
    kept = {f"a{i:02}" for i in range(18)}
    chosen = hold_out(concepts, 0.1, 0, kept)
    assert {code for code in chosen if code[0] == "a"} == {"a18", "a19"}
    assert sum(code[0] == "b" for code in chosen) == 2
    assert chosen == hold_out(concepts[::-1], 0.1, 0, kept)
    assert chosen != hold_out(concepts, 0.1, 1, kept)


def test_render_centres_on_white() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10"><rect width="20" height="10" fill="#00f"/></svg>'
    image = Image.open(io.BytesIO(render(svg)))
    assert image.size == (SIDE_PIXELS, SIDE_PIXELS)
    assert min(image.getpixel((SIDE_PIXELS // 2, 4))) > 245
    red, green, blue = image.getpixel((SIDE_PIXELS // 2, SIDE_PIXELS // 2))
    assert max(red, green) < 20
    assert blue > 235


def test_build_joins_the_packages_and_repeats_itself_to_the_byte(tmp_path: Path) -> None:
    _write_packages(tmp_path / "npm")
    counts = build(tmp_path / "npm", tmp_path / "one")
    build(tmp_path / "npm", tmp_path / "two")
    made = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert [str(p) for p in made] == ["concepts.csv", "images.zip", "rows/test.parquet", "rows/train.parquet"]
    for path in made:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
    lines = (tmp_path / "one" / "concepts.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == [f"1f60{i}" for i in range(9)] + ["2764"]
    hexcode, label, group, subgroup, _, tags = lines[-1].split(",")
    assert [hexcode, label, group, subgroup, tags] == [
        "2764",
        "red heart",
        "food and drink",
        "cooked or prepared",
        "love|warm heart",
    ]
    assert sum(line.split(",")[4] == "1" for line in lines) == 1
    assert (counts["concepts"], counts["test_concept/text_to_image"]) == (10, 1)
    (unseen,) = (line.split(",")[0] for line in lines if line.split(",")[4] == "1")
    codes = {line.split(",")[0] for line in lines} - {unseen}
    with zipfile.ZipFile(tmp_path / "one" / "images.zip") as archive:
        names = set(archive.namelist())
    added = {v: {_code(name) for name in names if name.startswith(f"{v}/")} for v in ADDED_VENDORS}
    assert added == {
        "fluent_color": codes,
        "noto_v1": codes - {"1f601", "1f602"},  # drawn alike
        "emojione": codes & {"1f604"},
        "fxemoji": codes & {"1f600"},  # under a name of its own
    }
    assert counts["images"] == len(names) == 3 * 10 + sum(map(len, added.values()))


def test_every_package_is_pinned() -> None:
    assert SHA256.keys() == PACKAGES.keys() == {*VENDORS.values(), "emojibase-data"}
    assert not CORE_VENDORS.keys() & ADDED_VENDORS.keys()


def test_build_names_a_missing_package_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        CremError, match=r"@iconify-json/noto is not unpacked at .*`npm pack @iconify-json/noto@1\.2\.9"
    ):
        build(tmp_path, tmp_path / "out")


def test_the_command_ends_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--npm-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert "is not unpacked at" in capsys.readouterr().err


def _write_packages(npm_dir: Path) -> None:
    """Ten concepts in the layout of the real packages, and what must be left out: a skin tone, a component, an emoji
    without a group, one that a core vendor does not draw, and an added vendor's two drawings that are alike."""
    codes = [f"1f60{i}" for i in range(9)] + ["2764-fe0f", "1f3fb", "1f1e6"]
    for number, (vendor, package) in enumerate(CORE_VENDORS.items()):
        drawn = [*codes, *(["1fabc"] if vendor == "noto" else [])]
        if vendor == "fluent":
            drawn[drawn.index("2764-fe0f")] = "2764"
        icons = {
            f"icon-{code}": {"body": f'<circle cx="{8 + i % 3}" cy="8" r="{4 + number}" fill="#{i:x}08040"/>'}
            for i, code in enumerate(drawn)
        }
        _write_json(npm_dir, package, "icons.json", {"icons": icons, "width": 16, "height": 16})
        _write_json(npm_dir, package, "chars.json", {code: f"icon-{code}" for code in drawn})
    added = {
        "fluent_color": {f"icon-{code}": n for n, code in enumerate(codes, start=1)},
        "noto_v1": {f"icon-{code}": 2 if code == "1f601" else n for n, code in enumerate(codes)},
        "emojione": {"icon-1f604": 1, "unknown": 2},
        "fxemoji": {"grin": 1, "icon-1f603": 2},
    }
    for vendor, radii in added.items():
        icons = {name: {"body": f'<circle cx="8" cy="8" r="{1 + radius / 2}"/>'} for name, radius in radii.items()}
        _write_json(npm_dir, VENDORS[vendor], "icons.json", {"icons": icons, "width": 16, "height": 16})
    emoji = [
        {
            "hexcode": code.upper(),
            "label": f"thing {i}" if i != 9 else "red heart",
            "tags": [f"word {i}", "thing"] if i != 9 else ["love", "<3", "warm heart"],
            "group": 1,
            "subgroup": 0,
            "order": i,
            "skins": [{"hexcode": "1F44B-1F3FB", "label": "toned", "group": 1, "subgroup": 0, "order": 99}],
        }
        for i, code in enumerate([*codes[:10], "1fabc"])
    ]
    emoji.append({"hexcode": "1F3FB", "label": "light skin tone", "group": 0, "subgroup": 0, "order": 50})
    emoji.append({"hexcode": "1F1E6", "label": "regional indicator A"})
    messages = {
        "groups": [{"key": "food-drink", "message": "food & drink"}, {"key": "component", "message": "components"}],
        "subgroups": [{"key": "food-prepared", "message": "cooked / prepared"}],
    }
    numbers = {"groups": {"0": "component", "1": "food-drink"}, "subgroups": {"0": "food-prepared"}}
    _write_json(npm_dir, "emojibase-data", "en/data.json", emoji[::-1])
    _write_json(npm_dir, "emojibase-data", "en/messages.json", messages)
    _write_json(npm_dir, "emojibase-data", "meta/groups.json", numbers)


def _write_json(npm_dir: Path, package: str, name: str, content: object) -> None:
    folder = f"{package.removeprefix('@').replace('/', '-')}-{PACKAGES[package]}"
    path = npm_dir / folder / "package" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
