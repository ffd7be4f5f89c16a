"""Concepts of the embedded corpus: emoji, the words for them, and their drawings by several vendors.

A concept is one base emoji of emojibase (no skin tones, which emojibase nests below their base) for which each of the
three core vendors has a drawing; the added vendors have drawings of some of them. Codes are compared in lower case
without the variation selector ``fe0f``, because the sources disagree on it. One concept in ten is held out of all
training, the same share of every group.

The packages of the added vendors give names of drawings but no codes. Most names are those of the core sets;
``names.csv`` has the others (emojione's older names; all of fxemoji's, with the codes of its source's file names).
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ADDED_VENDORS",
    "CORE_VENDORS",
    "PACKAGES",
    "VENDORS",
    "Concept",
    "hold_out",
    "normal_code",
    "read_concepts",
    "read_drawings",
]

CORE_VENDORS = {
    "noto": "@iconify-json/noto",
    "fluent": "@iconify-json/fluent-emoji-flat",
    "twemoji": "@iconify-json/twemoji",
}
"""Vendors that draw every concept: name in the corpus -> npm package of the drawings."""

ADDED_VENDORS = {
    "fluent_color": "@iconify-json/fluent-emoji",
    "noto_v1": "@iconify-json/noto-v1",
    "emojione": "@iconify-json/emojione",
    "fxemoji": "@iconify-json/fxemoji",
}
"""Vendors of further drawings for training."""

VENDORS = {**CORE_VENDORS, **ADDED_VENDORS}

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
    "emojibase-data": "17.0.0",
}
"""npm package -> pinned version."""

COMPONENT_GROUP = "components"  # skin tones and hair: parts of emoji, not images of anything
_PLAIN_TAG = re.compile(r"[\w' -]*[^\W\d_][\w' -]*")  # has a letter and no emoticon such as ":D"


@dataclass(frozen=True)
class Concept:
    """One emoji and the English words for it."""

    hexcode: str
    """Codepoints in lower case joined by ``-``, without ``fe0f``."""
    label: str
    tags: tuple[str, ...]
    group: str
    """For example ``animals and nature``."""
    subgroup: str
    """For example ``marine life``."""


def unpacked(npm_dir: Path, package: str) -> Path:
    """Where ``npm pack`` and an extraction put the files of ``package``."""
    return npm_dir / f"{package.removeprefix('@').replace('/', '-')}-{PACKAGES[package]}" / "package"


def normal_code(hexcode: str) -> str:
    """The code by which the sources are joined: ``2764-FE0F`` becomes ``2764``."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_drawings(npm_dir: Path, vendor: str) -> dict[str, str]:
    """SVG documents of one vendor by normal code."""
    icon_set = _read_json(unpacked(npm_dir, VENDORS[vendor]) / "icons.json")
    drawings = {}
    for code, name in _names(npm_dir, vendor):
        icon = icon_set["icons"].get(name)
        if icon is None:  # not drawn, or an alias: a mirrored or renamed drawing of another code
            continue
        width, height = (icon.get(side, icon_set.get(side, 16)) for side in ("width", "height"))  # 16: iconify's own
        drawings[code] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
    return drawings


def read_concepts(npm_dir: Path, drawn: Collection[str]) -> list[Concept]:
    """Base emoji of emojibase whose code is in ``drawn``, in Unicode's order."""
    folder = unpacked(npm_dir, "emojibase-data")
    groups = _numbered_words(folder, "groups")
    subgroups = _numbered_words(folder, "subgroups")
    concepts = []
    for emoji in sorted(_read_json(folder / "en" / "data.json"), key=lambda e: e.get("order", 0)):
        code = normal_code(emoji["hexcode"])
        if code not in drawn or groups.get(emoji.get("group")) in (None, COMPONENT_GROUP):
            continue
        concepts.append(
            Concept(
                hexcode=code,
                label=emoji["label"],
                tags=tuple(dict.fromkeys(t for t in emoji.get("tags", ()) if _PLAIN_TAG.fullmatch(t))),
                group=groups[emoji["group"]],
                subgroup=subgroups[emoji["subgroup"]],
            )
        )
    repeated = [label for label, count in Counter(c.label for c in concepts).items() if count > 1]
    assert not repeated, f"labels of several concepts: {repeated}"
    return concepts


def hold_out(concepts: Sequence[Concept], share: float, seed: int, kept: Collection[str] = ()) -> frozenset[str]:
    """Codes of the concepts kept out of training: ``share`` of every group, none of ``kept``."""
    by_group = defaultdict(list)
    for concept in concepts:
        by_group[concept.group].append(concept.hexcode)
    held_out: set[str] = set()
    for group, codes in sorted(by_group.items()):
        free = sorted(set(codes) - set(kept))
        held_out.update(random.Random(f"{seed}/{group}").sample(free, min(len(free), round(share * len(codes)))))
    return frozenset(held_out)


def _names(npm_dir: Path, vendor: str) -> list[tuple[str, str]]:
    """Pairs of normal code and name of a drawing; an added vendor may lack the drawing."""
    if vendor in CORE_VENDORS:
        chars = _read_json(unpacked(npm_dir, VENDORS[vendor]) / "chars.json")
        return [(normal_code(code), name) for code, name in chars.items()]
    with (Path(__file__).parent / "names.csv").open(encoding="utf-8", newline="") as file:
        own = [(line["hexcode"], line["name"]) for line in csv.DictReader(file) if line["vendor"] == vendor]
    if vendor == "fxemoji":  # names differ in meaning: its "dog" is a dog's face, elsewhere the whole animal
        return own
    return [pair for core in CORE_VENDORS for pair in _names(npm_dir, core)] + own


def _numbered_words(folder: Path, kind: str) -> dict[int, str]:
    """Number of a group or subgroup in the records -> its name in plain words."""
    messages = {m["key"]: m["message"] for m in _read_json(folder / "en" / "messages.json")[kind]}
    numbered = _read_json(folder / "meta" / "groups.json")[kind]
    return {int(n): messages[key].replace(" & ", " and ").replace(" / ", " or ") for n, key in numbered.items()}


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
