"""What the model embeds and talks about: an item is a text, one or more images, or both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from crem.errors import ItemError

__all__ = ["ImageSource", "Item", "as_item"]

ImageSource = Image.Image | bytes | str | Path
"""A decoded picture, an encoded file's bytes, or a path, ``file://``/``s3://`` URI or ``data:`` URL."""


@dataclass(frozen=True)
class Item:
    """One thing to embed or to ask about.

    Attributes:
        text: its text, if any.
        images: its pictures, in the order in which the model reads them; they precede the text.
        instruction: embedding instruction; the checkpoint's own where None.
    """

    text: str | None = None
    images: tuple[ImageSource, ...] = field(default=())
    instruction: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.images, tuple):  # a list is what people write
            object.__setattr__(self, "images", tuple(self.images))


def as_item(value: Any) -> Item:
    """``value`` as an ``Item``: a plain string is a text; a picture, bytes or a ``Path`` is one image.

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
