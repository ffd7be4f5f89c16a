"""Copies of a picture have a near signature; other pictures, and the same shape in another colour, have not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipelines.duplicates.image_signature import IMAGE_SIGNATURE, ImageRelation, image_signature
from tests.pipelines.duplicates.planted import COPIES, jpeg, photo, png

NEAR = ImageRelation(bits=6)


def near(a: bytes, b: bytes) -> bool:
    sizes = [Image.open(io.BytesIO(data)).size for data in (a, b)]
    signatures = np.array([image_signature(data, *size) for data, size in zip((a, b), sizes, strict=True)])
    assert signatures.dtype == IMAGE_SIGNATURE
    return bool(NEAR.near(signatures, np.array([0]), np.array([1]))[0])


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("size", [(160, 120), (640, 480)])
def test_a_copy_is_near(copy: str, size: tuple[int, int]) -> None:
    found = [near(jpeg(photo(seed, size)), COPIES[copy](photo(seed, size))) for seed in range(3)]
    assert all(found)


def test_other_pictures_are_not_near() -> None:
    pictures = [png(photo(seed)) for seed in range(30)]
    signatures = np.array([image_signature(data, 160, 120) for data in pictures])
    i, j = np.triu_indices(30, 1)
    assert not NEAR.near(signatures, i, j).any()


def disc(colour: tuple[int, int, int]) -> bytes:
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 80, 80), fill=colour)
    return png(image)


def test_colour_tells_pictures_of_one_shape_apart() -> None:
    assert not near(disc((220, 40, 40)), disc((40, 80, 220)))
    assert near(disc((220, 40, 40)), disc((225, 45, 40)))


def test_blank_pictures_are_near_if_they_are_of_one_colour() -> None:
    white, grey, red = (png(Image.new("RGB", (64, 64), c)) for c in ("white", (250, 250, 250), (200, 0, 0)))
    assert near(white, grey) and not near(white, red) and not near(white, png(Image.new("RGB", (64, 64), "black")))


def test_another_shape_of_the_frame_is_another_picture() -> None:
    assert not near(png(photo(1)), png(photo(1).resize((160, 60))))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2)])
def test_slivers_have_signatures(size: tuple[int, int]) -> None:
    assert image_signature(png(Image.new("RGB", size)), *size).dtype == IMAGE_SIGNATURE
