"""Items: what may be written for one, and where its images stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crem import Item
from crem.errors import ItemError

OLD, NEW = Image.new("RGB", (8, 8), (1, 2, 3)), b"encoded"


def test_parts_keep_their_order() -> None:
    item = Item.of_parts(["Before: ", OLD, " After: ", NEW, Path("c.png")], "Compare.")
    assert item == Item("Before:  After: ", (OLD, NEW, Path("c.png")), "Compare.", (8, 16, 16))
    assert Item.of_parts(["a", "b", NEW, "", "c"]) == Item("abc", (NEW,), image_at=(2,))


def test_images_before_the_text_are_written_in_one_way() -> None:
    assert Item.of_parts([OLD, NEW, "text"]) == Item("text", [OLD, NEW], image_at=(0, 0)) == Item("text", [OLD, NEW])
    assert Item.of_parts([OLD]) == Item(None, OLD) and Item.of_parts(["text"]) == Item("text")


def test_places_may_be_a_list_or_an_array() -> None:
    for places in ([1, 2], np.array([1, 2], np.int32)):
        item = Item("ab", [OLD, NEW], image_at=places)  # type: ignore[arg-type]
        assert item.image_at == (1, 2) and all(type(place) is int for place in item.image_at)
    assert Item("ab", [OLD], image_at=[]).image_at == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "images", "places", "message"),
    [
        ("ab", 1, (0, 1), "2 places for 1 images"),
        ("ab", 0, (1,), "1 places for 0 images"),
        ("ab", 2, (2, 1), r"\[2, 1\] for a text of 2 characters; the places must ascend"),
        ("ab", 2, (1, 3), "at most its length"),
        ("ab", 2, (-1, 2), "ascend from 0"),
        (None, 1, (1,), "a text of 0 characters"),
    ],
)
def test_places_that_do_not_fit_are_refused(
    text: str | None, images: int, places: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ItemError, match=message) as error:
        Item(text, [OLD] * images, image_at=places)
    assert error.value.reason == "bad_image_at"


def test_a_part_of_another_type_is_refused() -> None:
    with pytest.raises(ItemError, match="cannot read a int as an item"):
        Item.of_parts(["a", 3])  # type: ignore[list-item]
