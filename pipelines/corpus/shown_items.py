"""Items as the pages of a corpus show them: pieces of text and images in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Part", "Piece", "pieces_of", "size_text"]


@dataclass(frozen=True)
class Piece:
    """A text or an image."""

    text: str = ""
    image: str = ""
    """``data:`` URL"""
    alt: str = ""


@dataclass(frozen=True)
class Part:
    """A named part of a row: a side, a question, an answer."""

    name: str
    pieces: tuple[Piece, ...]


def pieces_of(
    text: str | None, images: Sequence[str], image_at: Sequence[int], *, alts: Sequence[str] = (), limit: int
) -> Iterator[Piece]:
    """The pieces of an item.

    Args:
        images: ``data:`` URLs.
        image_at: of ``crem.data.items.Item``.
        alts: what each image is called.
        limit: characters that are shown of each piece of text.
    """
    rest, at = text or "", 0
    places = image_at or (0,) * len(images)
    for number, (image, place) in enumerate(zip(images, places, strict=True)):
        if rest[at:place]:
            yield Piece(_cut(rest[at:place], limit))
        at = max(at, place)
        yield Piece(image=image, alt=alts[number] if alts else "")
    if rest[at:]:
        yield Piece(_cut(rest[at:], limit))


def size_text(size_bytes: float) -> str:
    """Bytes in the unit that people would use."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while size_bytes >= 1000 and power < len(units) - 1:
        size_bytes, power = size_bytes / 1000, power + 1
    return f"{size_bytes:,.{1 if power else 0}f} {units[power]}"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"
