"""The marks that publishers write into a text where an image stands, and what becomes of them.

A mark becomes the place of its image (``image_at``). Left in, it would be read as words: the embedding of such a text
has a cosine of about 0.1 to that of the clean one. Marks are those of LLaVA (``<image>``), Phi-3 and MMEB
(``<|image_1|>``), MMMU (``<image 1>``), Llama 3.2 (``<|image|>``), Qwen-VL (``Picture 1: <img>a.jpg</img>``), Qwen2-VL
(``<|vision_start|><|image_pad|><|vision_end|>``), MiniGPT-4, InternVL, DeepSeek-VL, InternLM-XComposer, MiniCPM-V,
GLM-4V, Gemma 3, Idefics, and ``[IMG]``; case does not count. What closes a mark is part of it.
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
    "paths_in_marks",
    "place_images",
    "placed",
    "remove_marks",
]

ImageName: TypeAlias = str | bytes

Parts: TypeAlias = list[str | int]
"""A text in pieces: words, and the numbers of images (from 0) in their places."""

MARK = "<image>"
_NUMBER = r"[ _:#-]{0,2}\d{1,4}"
_KINDS = "(?:placeholder|token|pad|soft[_ -]?token|context|here|sentinel)"
_ONE = (
    rf"<\|(?:image|img)(?:{_NUMBER}|[_ -]?{_KINDS})?\|>"
    rf"|<(?:image(?:{_NUMBER}|[_ -]?{_KINDS}|\s*/)?|img(?:{_NUMBER}|[_ -]{_KINDS}))>"
)
_PADS = r"(?:<\|?(?:image|img)_(?:pad|soft_token|context)\|?>\s*)+"
_OPEN = (
    r"<\|?vision_start\|?>|<im_start>|<\|?(?:begin|start)_of_image\|?>|<\|?image_(?:start|begin)\|?>"
    r"|<fake_token_around_image>"
)
_CLOSE = r"<\|?vision_end\|?>|<im_end>|<\|?end_of_image\|?>|<\|?image_end\|?>|<fake_token_around_image>|</image>|</img>"
_MARK = re.compile(
    r"(?:Picture \d{1,4}: ?)?<img>(?P<path>\s*|(?!\s)(?:(?!<img>)[^\n]){1,1024}?(?<!\s))</img>"
    r"|\(<image>\./</image>\)"
    r"|<image>[^\s<>]{1,1024}</image>"
    rf"|(?:{_OPEN})\s*{_PADS}(?:{_CLOSE})"
    rf"|(?:(?:{_OPEN})\s*)?(?:{_ONE})(?:\s*(?:{_CLOSE}))?"
    r"|<\|?start_of_image\|?>(?:\s*<\|?end_of_image\|?>)?"
    rf"|(?-i:\[(?:IMG|IMAGE)(?:{_NUMBER})?\](?:\[/(?:IMG|IMAGE)\])?)",
    re.IGNORECASE,
)
_NUMBER_IN_MARK = re.compile(r"(?:[<|[](?:image|img)[ _:#-]{0,2}|picture )(\d{1,4})", re.IGNORECASE)
_BARE = re.compile(r"<img\s*/?>", re.IGNORECASE)
"""Also a word of HTML. It is a mark only where there are images and no other mark."""


@dataclass(frozen=True)
class PlacedText:
    """A text without marks, and its images in the order in which the text has them."""

    text: str | None
    images: tuple[ImageName, ...]
    image_at: tuple[int, ...]
    """Of ``crem.data.items.Item``."""


def count_marks(text: str | None, *, bare: bool = True) -> int:
    """How many marks a text holds. Without ``bare``, ``<img>`` is none: there are no images."""
    return 0 if text is None else len(_found(text, bare))


def paths_in_marks(text: str) -> list[str]:
    """The paths that marks such as ``<img>a.jpg</img>`` hold."""
    return [mark["path"].strip() for mark in _MARK.finditer(text) if _is_path(mark["path"])]


def remove_marks(text: str | None, *, bare: bool = True) -> str | None:
    """The text without marks, for a side that has no image by its publisher's habit; None where nothing is left."""
    if text is None or not count_marks(text, bare=bare):
        return text
    parts, _ = _split(text, bare)
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
    bare = images > 0 and not any(count_marks(text, bare=False) for text in texts)
    found = [_split(text, bare) for text in texts]
    numbers = [number for _, marks in found for number in marks]
    if not numbers:
        return [[text] for text in texts]
    first = 0 if 0 in numbers else 1
    named = {number - first for number in numbers if number is not None}
    unnamed = iter(i for i in range(images) if i not in named)
    order = [next(unnamed, images) if number is None else number - first for number in numbers]
    if set(order) != set(range(images)):
        shown = next(text for text in texts if count_marks(text, bare=bare))
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
    if text is None or not count_marks(text, bare=bool(images)):
        return PlacedText(text, images, ())
    return joined(placed([text], len(images), where)[0], images)


def _found(text: str, bare: bool) -> list[re.Match[str]]:
    marks = list(_MARK.finditer(text))
    return marks if marks or not bare else list(_BARE.finditer(text))


def _split(text: str, bare: bool) -> tuple[list[str], list[int | None]]:
    """The words between the marks of a text (one piece more than there are marks), and the number in each mark."""
    words, numbers, end = [], [], 0
    for mark in _found(text, bare):
        words.append(text[end : mark.start()])
        number = _NUMBER_IN_MARK.search(mark[0])
        numbers.append(int(number[1]) if number else None)
        end = mark.end()
    return [*words, text[end:]], numbers


def _is_path(text: str | None) -> bool:
    """Whether what a mark encloses is a path, and not another mark."""
    return bool(text and text.strip()) and "<" not in str(text)
