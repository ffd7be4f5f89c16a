"""What the model embeds and answers about: an item is a text, one or more images, or both. A training example is built
of items.

This module imports neither torch nor transformers, so that data workers that only pass items on start fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from crem.errors import ItemError

__all__ = ["ImageSource", "Item", "TrainingExample", "as_item"]

ImageSource = Image.Image | bytes | str | Path
"""A decoded image, an encoded file's bytes, or a path, ``file://``/``s3://`` URI or ``data:`` URL."""


@dataclass(frozen=True)
class Item:
    """A text, images or both, to embed or to ask about.

    Attributes:
        text: may be None where there are images.
        images: in the order in which the model reads them; they precede the text.
        instruction: embedding instruction; the checkpoint's own where None.
        image_at: how many characters of the text precede each image, ascending; empty where all images precede it.
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
