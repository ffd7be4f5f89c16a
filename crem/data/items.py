"""What the model embeds and answers about: an item is a text, one or more images, or both. A training example is built
of items.

This module imports neither torch nor transformers, so that data workers that only pass items on start fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from crem.errors import ItemError

__all__ = ["ImageSource", "Item", "TrainingExample", "as_item", "check_image_at"]

ImageSource = Image.Image | bytes | str | Path
"""A decoded image, an encoded file's bytes, or a path, ``file://``/``s3://`` URI or ``data:`` URL."""


@dataclass(frozen=True)
class Item:
    """A text, images or both, to embed or to ask about.

    Images stand before the text, or at places in it:

        Item("Is this ripe?", [photo])                               photo, then the text
        Item.of_parts(["Before: ", old, " After: ", new])            the parts in this order

    Attributes:
        text: may be None where there are images.
        images: in the order in which the model reads them.
        instruction: embedding instruction; the checkpoint's own where None.
        image_at: how many characters of the text precede each image, ascending; empty where all images precede it.

    Raises:
        ItemError: ``bad_image_at``, if ``image_at`` does not fit the images and the text.
    """

    text: str | None = None
    images: tuple[ImageSource, ...] = field(default=())
    instruction: str | None = None
    image_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.images, ImageSource):  # a single image without a list around it
            object.__setattr__(self, "images", (self.images,))
        elif not isinstance(self.images, tuple):  # callers usually pass a list
            object.__setattr__(self, "images", tuple(self.images))
        if not isinstance(self.image_at, tuple) or self.image_at:
            check_image_at(self.image_at, images=len(self.images), text=self.text)
            places = tuple(map(int, self.image_at))
            object.__setattr__(self, "image_at", places if any(places) else ())  # one way to say one thing

    @classmethod
    def of_parts(cls, parts: Sequence[str | ImageSource], instruction: str | None = None) -> Item:
        """An item of texts and images in any order.

        Args:
            parts: a string is a text, exactly as it is, spaces included; a PIL image, bytes or a ``Path`` is an image.
                (An image that only a URI names: give ``images`` and ``image_at`` to ``Item`` itself.)
            instruction: embedding instruction; the checkpoint's own where None.

        Raises:
            ItemError: ``bad_item`` for a part of another type.
        """
        text, places = "", []
        images: list[ImageSource] = []
        for part in parts:
            if isinstance(part, str):
                text += part
            else:
                images += as_item(part).images
                places.append(len(text))
        return cls(text or None, tuple(images), instruction, tuple(places))


def check_image_at(image_at: Sequence[int], *, images: int, text: str | None) -> None:
    """Refuse places that do not fit ``images`` images in ``text``; no places at all always fit.

    Raises:
        ItemError: ``bad_image_at``.
    """
    places, length = list(image_at), len(text or "")
    if not places:
        return
    if len(places) != images:
        raise ItemError("bad_image_at", f"image_at has {len(places)} places for {images} images; give one for each")
    if places != sorted(places) or places[0] < 0 or places[-1] > length:
        raise ItemError(
            "bad_image_at",
            f"image_at is {str(places)[:60]} for a text of {length} characters; the places must ascend from 0 to at "
            "most its length",
        )


@dataclass(frozen=True)
class TrainingExample:
    """One training row, ready to collate: a query, and optionally its target, negatives and generation turn.

    The content keys tell InfoNCE which negatives are false ones.
    """

    query: Item
    target: Item | None = None
    negatives: tuple[Item, ...] = ()
    question: str | None = None
    answer: str | None = None
    z: bool = False
    """compression bit; drawn by the mixing plan (``crem.data.mixing``), fixed for the row from then on"""
    seed: tuple[int, ...] = ()
    """run, step and row: seed of the random changes of its images"""
    query_key: int = -1
    """content hash of the query; targets of equal queries are not negatives of each other; -1 matches nothing"""
    target_key: int = -1
    """content hash of the target; equal targets are not negatives of each other's queries; -1 matches nothing"""
    negative_keys: tuple[int, ...] = ()
    """content hashes of the hard negatives; one equal to a query's target is not its negative; empty matches nothing"""


def as_item(value: Any) -> Item:
    """``value`` as an ``Item``: a plain string is a text; an image, bytes or a ``Path`` is one image.

    Raises:
        ItemError: ``bad_item`` for any other type.
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        return Item(text=value)
    if isinstance(value, Image.Image | bytes | Path):
        return Item(images=(value,))
    raise ItemError(
        "bad_item",
        f"cannot read a {type(value).__name__} as an item; give a str, a PIL image, image bytes, a pathlib.Path, "
        "or crem.Item(text=…, images=[…])",
    )
