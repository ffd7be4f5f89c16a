"""What the model embeds and talks about: an item is a text, one or more images, or both; a pair is a training row.

Light on purpose: data workers that only carry items import neither torch nor transformers.
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
    """One thing to embed or to ask about.

    Attributes:
        text: its text, if any.
        images: its images, in the order in which the model reads them; they precede the text.
        instruction: embedding instruction; the checkpoint's own where None.
    """

    text: str | None = None
    images: tuple[ImageSource, ...] = field(default=())
    instruction: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.images, ImageSource):  # one image without the list around it
            object.__setattr__(self, "images", (self.images,))
        elif not isinstance(self.images, tuple):  # a list is what people write
            object.__setattr__(self, "images", tuple(self.images))


@dataclass(frozen=True)
class TrainingExample:
    """One training row, ready to collate: a query, and optionally its target, negatives and generation turn.

    ``z`` is the row's compression bit; it is drawn by the plan (``crem.data.mixing``) and stays with the row.
    """

    query: Item
    target: Item | None = None
    negatives: tuple[Item, ...] = ()
    question: str | None = None
    answer: str | None = None
    z: bool = False
    seed: tuple[int, ...] = ()
    """run, step and row: what the random changes of its images are drawn from"""
    query_key: int = -1
    """Content hash of the query: the targets of equal queries are no negatives of each other. -1 matches nothing."""
    target_key: int = -1
    """Content hash of the target: equal targets are no negatives of each other's queries. -1 matches nothing."""
    negative_keys: tuple[int, ...] = ()
    """Content hash of each hard negative: one that equals a query's target is no negative of that query. Empty matches
    nothing."""


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
