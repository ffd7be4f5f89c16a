"""Prepared tables of drawn shapes whose rows have no question yet, and some that must not be asked about."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from crem.config import load_config
from pipelines.corpus.prepare import prepare
from tests.pipelines.conftest import write_rows
from tests.pipelines.shapes import COLOURS, SHAPES, draw

ASKABLE = 24
SKIPPED = {"other_split": 12, "no_image": 12, "has_question": 1}
ROWS = ASKABLE + sum(SKIPPED.values())


def write_unasked(folder: Path) -> str:
    """``ROWS`` rows in prepared tables, ``ASKABLE`` of which wait for a question."""
    raw = folder / "raw"
    (raw / "images").mkdir(parents=True)
    rows = []
    for colour, shape in product(COLOURS, SHAPES):
        thing = f"{colour} {shape}"
        for size, split in ((14, "train"), (20, "train"), (17, "test")):
            name = f"{colour}-{shape}-{size}.png"
            (raw / "images" / name).write_bytes(draw(colour, shape, size))
            rows.append({"key": name, "split": split, "query_images": [name], "target_text": thing})
        rows.append({"key": f"text {thing}", "query_text": thing, "target_images": [f"{colour}-{shape}-14.png"]})
    rows[0]["query_instruction"] = "Find the word for it."
    rows.append(rows[0] | {"key": "asked", "question": "Which one?", "answer": "this one"})
    write_rows(raw / "rows.jsonl", rows)
    prepare(str(raw), str(folder / "prepared"), load_config("micro"))
    return str(folder / "prepared")
