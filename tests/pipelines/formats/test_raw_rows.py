"""Cells as real exports write them: what is absent, and what is text."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from crem.errors import ItemError
from pipelines.formats.cells import parse_images, parse_text_value
from pipelines.formats.raw_rows import parse_row


@pytest.mark.parametrize(
    "cell",
    [
        *(None, "", "  ", float("nan"), np.float64("nan"), pd.NaT, pd.NA, Decimal("NaN"), [], [None], [""], ["", None]),
        *([float("nan")], {"bytes": None, "path": None}, {"bytes": b"", "path": ""}, [{"bytes": None, "path": None}]),
        *("null", "None", "nan", "<NA>", ["NaN"]),
    ],
)
def test_no_image_is_no_image_however_it_is_written(cell: Any) -> None:
    assert parse_images(cell, "images") == ()
    row = parse_row({"query_text": "a", "target_text": "b", "target_images": cell}, key="k", source="s")
    assert (row.target.text, row.target.images) == ("b", ())


def test_images_beside_absent_ones_are_kept() -> None:
    assert parse_images(["a.jpg", None, "", {"bytes": b"x", "path": "p"}, {"bytes": None, "path": "b.jpg"}], "c") == (
        *("a.jpg", b"x", "b.jpg"),
    )
    assert parse_images(b"", "c") == (b"",)  # an empty file is a damaged image, not none
    for wrong in (7, True, ["a.jpg", 7], {"a": 1, "bytes": 3}):
        with pytest.raises(ItemError, match="an image is a path, a URI or bytes"):
            parse_images(wrong, "c")


@pytest.mark.parametrize(
    ("cell", "image"),
    [
        ({"uri": "a.jpg"}, "a.jpg"),
        ({"URL": "a.jpg", "width": 7}, "a.jpg"),
        ({"Path": "a.jpg"}, "a.jpg"),
        ({"file_name": "a.jpg", "id": 3}, "a.jpg"),
        ({"fileName": "a.jpg"}, "a.jpg"),
        ({"type": "image_url", "image_url": {"url": "a.jpg"}}, "a.jpg"),
        ({"data": b"x", "mime": "image/png"}, b"x"),
        ({"Bytes": b"", "path": "a.jpg"}, "a.jpg"),
    ],
)
def test_objects_name_their_image_as_people_do(cell: Any, image: str | bytes) -> None:
    assert parse_images([cell], "images") == parse_images(cell, "image") == (image,)


def test_an_object_without_an_image_is_never_dropped() -> None:
    for cell, key in (({"Href": "a.jpg", "path": None}, "Href"), ({"image_url": {"detail": "low"}}, "detail")):
        with pytest.raises(ItemError, match=rf"bad_row.*'{key}'.*name it bytes"):
            parse_images([cell], "images")
    assert parse_images([{}, {"image_url": {"url": None}}], "images") == ()


def test_lists_in_cells_of_text_are_lists() -> None:
    row = parse_row(
        {"query_images": '["a.jpg", "b.jpg"]', "target_text": "[1]", "negatives": '[{"text": "n"}]'},
        key="k",
        source="s",
    )
    assert (row.query.images, row.target.text, row.negatives[0].text) == (("a.jpg", "b.jpg"), "[1]", "n")
    assert parse_images("[1].jpg", "c") == ("[1].jpg",)
    assert parse_images("[not json]", "c") == ("[not json]",)


def test_arrow_types_become_text() -> None:
    table = pa.table(
        {
            "decimal": pa.array([Decimal("4.50")], pa.decimal128(5, 2)),
            "unsigned": pa.array([2**63], pa.uint64()),
            "dictionary": pa.array(["cat"]).dictionary_encode(),
            "large": pa.array(["cat"], pa.large_string()),
            "view": pa.array(["cat"], pa.string_view()),
            "binary": pa.array([b"caf\xc3\xa9"], pa.binary()),
            "day": pa.array([date(2026, 11, 28)]),
            "half": pa.array(np.array([0.5], np.float16)),
        }
    )
    record = table.to_pylist()[0]
    assert {name: parse_text_value(value, name) for name, value in record.items()} == {
        "decimal": "4.50",
        "unsigned": str(2**63),
        "dictionary": "cat",
        "large": "cat",
        "view": "cat",
        "binary": "café",
        "day": "2026-11-28",
        "half": "0.5",
    }
    for wrong in (True, ["a"], {"a": 1}, b"\xff"):
        with pytest.raises(ItemError, match="bad_row"):
            parse_text_value(wrong, "text")


def test_a_negative_under_unknown_names_is_never_dropped() -> None:
    for negative in ({"body": "n"}, {"caption": "n", "text": None}):
        with pytest.raises(ItemError, match=r"bad_row.*negatives\[1\].*text, images or instruction"):
            parse_row({"negatives": [{"text": "a"}, negative]}, key="k", source="s")
    assert parse_row({"negatives": [{"text": None, "body": ""}, {}]}, key="k", source="s").negatives == ()
