"""Content keys: what tells InfoNCE that two sides are the same content."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.tables.prepared import _content_key

PINNED = 5389821279016559025
"""Of the first version. Another value would change which negatives of a resumed run are false ones."""


def side(text: str | None, images: list[int] | None, image_at: list[int] | None) -> dict[str, Any]:
    return {"text": text, "instruction": None, "images": images, "image_at": image_at}


@pytest.mark.parametrize("image_at", [None, [], [0, 0]])
def test_keys_of_sides_without_places_are_those_of_all_versions(image_at: list[int] | None) -> None:
    assert _content_key(side("a red apple", [1, -2], image_at)) == PINNED
    assert _content_key(None) == -1


def test_the_place_of_an_image_is_content() -> None:
    keys = {_content_key(side("a red apple", [1, 2], at)) for at in ([], [0, 2], [2, 2], [2, 11])}
    assert len(keys) == 4 and min(keys) >= 0
