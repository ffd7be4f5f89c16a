"""Texts are stored in one normal form, and places in them are checked against it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crem.errors import ItemError
from pipelines.formats.raw_rows import RawItem, check_row, parse_row, source_and_key


def test_composed_and_decomposed_texts_are_the_same_row() -> None:
    forms = [
        {"key": text, "query_text": text, "target_text": text, "negatives": [{"text": text}], "answer": text}
        for text in ("caf\u00e9 \uac00", "cafe\u0301 \u1100\u1161")
    ]
    composed, decomposed = (parse_row(record, key="k", source="s") for record in forms)
    assert composed == decomposed and composed.query.text == "caf\u00e9 \uac00"
    assert source_and_key(forms[0], key="k", source="s") == source_and_key(forms[1], key="k", source="s")


@pytest.mark.parametrize(
    ("side", "message"), [("query", "2 places for 1 images"), ("target", "a text of 2 characters")]
)
def test_places_that_do_not_fit_reject_the_row(side: str, message: str) -> None:
    row = parse_row({"query_text": "ab", "target_text": "cd"}, key="k", source="s")
    places = (0, 1) if side == "query" else (3,)
    bad = RawItem("ab", ("a.png",), None, places)
    with pytest.raises(ItemError, match=message) as error:
        check_row(replace(row, **{side: bad}), max_text_chars=9, max_images=9)
    assert error.value.reason == "bad_image_at"
