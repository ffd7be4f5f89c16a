"""The marks that publishers write into a text where an image stands, and what becomes of them.

A mark becomes the place of its image (``image_at``). Left in, it would be read as words: the embedding of such a text
has a cosine of about 0.1 to that of the clean one. Marks are those of LLaVA (``<image>``), Phi-3 and MMEB
(``<|image_1|>``), Llama 3.2 (``<|image|>``), Qwen2-VL (``<|vision_start|><|image_pad|><|vision_end|>``), DeepSeek-VL,
InternLM-XComposer, Gemma 3, and ``[IMG]``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from crem.errors import ItemError

__all__ = [
    "MARK",
    "ImageName",
    "Parts",
    "PlacedText",
    "count_marks",
    "joined",
    "place_images",
    "placed",
    "remove_marks",
]

ImageName: TypeAlias = str | bytes

Parts: TypeAlias = list[str | int]
"""A text in pieces: words, and the numbers of images (from 0) in their places."""

MARK = "<image>"
_MARK = re.compile(
    r"<\|vision_start\|>\s*(?:<\|image_pad\|>\s*)+<\|vision_end\|>"
    r"|<im_start>\s*<image>\s*<im_end>"
    r"|<\|image(?:_pad)?(?:_?(?P<bar>\d{1,4}))?\|>"
    r"|<image(?:_?(?P<angle>\d{1,4}))?>"
    r"|\[(?:IMG|IMAGE)(?:_?(?P<square>\d{1,4}))?\]"
    r"|<(?:image_placeholder|ImageHere|start_of_image)>"
)


@dataclass(frozen=True)
class PlacedText:
    """A text without marks, and its images in the order in which the text has them."""

    text: str | None
    images: tuple[ImageName, ...]
    image_at: tuple[int, ...]
    """Of ``crem.data.items.Item``."""


def count_marks(text: str | None) -> int:
    """How many marks a text holds."""
    return 0 if text is None else sum(1 for _ in _MARK.finditer(text))


def remove_marks(text: str | None) -> str | None:
    """The text without marks, for a side that has no image by its publisher's habit; None where nothing is left."""
    if text is None or not count_marks(text):
        return text
    parts, _ = _split(text)
    clean = parts[0]
    for part in parts[1:]:
        between = clean[len(clean.rstrip()) :] + part[: len(part) - len(part.lstrip())]
        space = "\n" if "\n" in between else " " if between else ""
        clean = clean.rstrip() + space + part.lstrip()
    return clean.strip() or None


def placed(texts: Sequence[str], images: int, where: str) -> list[Parts]:
    """The parts of texts that share some images.

    A mark with a number stands for the image of that number, counted from 1, or from 0 where a text has a 0; the others
    stand for the remaining images in their order. Texts without any mark are one part each.

    Raises:
        ItemError: ``image_count``: there are marks, and they do not stand for exactly the images.
    """
    found = [_split(text) for text in texts]
    numbers = [number for _, marks in found for number in marks]
    if not numbers:
        return [[text] for text in texts]
    first = 0 if 0 in numbers else 1
    named = {number - first for number in numbers if number is not None}
    unnamed = iter(i for i in range(images) if i not in named)
    order = [next(unnamed, images) if number is None else number - first for number in numbers]
    if set(order) != set(range(images)):
        shown = next(text for text in texts if count_marks(text))
        raise ItemError(
            "image_count",
            f"{where} has {len(numbers)} image placeholder{'s' if len(numbers) > 1 else ''} and {images} "
            f"image{'' if images == 1 else 's'}: {shown[:60]!r}; give an image for each placeholder",
        )
    following = iter(order)
    return [[words[0], *(part for word in words[1:] for part in (next(following), word))] for words, _ in found]


def joined(parts: Parts, images: Sequence[ImageName]) -> PlacedText:
    """Parts as one text with places. Blanks around the whole text go; no place means that all images precede it."""
    whole = "".join(part for part in parts if isinstance(part, str))
    clean = whole.strip()
    cut = len(whole) - len(whole.lstrip())
    order, places, passed = [], [], 0
    for part in parts:
        if isinstance(part, str):
            passed += len(part)
        else:
            order.append(images[part])
            places.append(min(max(passed - cut, 0), len(clean)))
    return PlacedText(clean or None, tuple(order), tuple(places) if any(places) else ())


def place_images(text: str | None, images: tuple[ImageName, ...], where: str) -> PlacedText:
    """Turn the marks of one text into the places of its images; a text without marks follows its images.

    Raises:
        ItemError: ``image_count``, as ``placed``.
    """
    if text is None or not count_marks(text):
        return PlacedText(text, images, ())
    return joined(placed([text], len(images), where)[0], images)


def _split(text: str) -> tuple[list[str], list[int | None]]:
    """The words between the marks of a text (one piece more than there are marks), and the number in each mark."""
    words, numbers, end = [], [], 0
    for mark in _MARK.finditer(text):
        words.append(text[end : mark.start()])
        digits = mark["bar"] or mark["angle"] or mark["square"]
        numbers.append(int(digits) if digits else None)
        end = mark.end()
    return [*words, text[end:]], numbers
