"""What can be said of an image file from its bytes, before a decoder allocates memory for it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from crem.config import ImageConfig
from crem.errors import ItemError

__all__ = ["check_area", "check_header", "is_cut_short", "without_metadata"]

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"})
_MAX_SCANS = 200
"""Of a progressive JPEG; encoders write about ten. Each costs a pass over all pixels: a small file could take hours."""
_FEWEST_PIXEL_BYTES = 80
"""A truncated file with less after its header shows nothing."""
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
"""JPEG markers without a length."""


def check_area(width: int, height: int, limits: ImageConfig) -> None:
    """Refuse a declared size over ``limits.max_source_pixels``.

    Raises:
        ItemError: ``image_too_large`` or ``image_corrupt``.
    """
    area = width * height
    if area > limits.max_source_pixels:
        raise ItemError(
            "image_too_large",
            f"{width} x {height} = {area} pixels is over the limit of {limits.max_source_pixels}; "
            "shrink it or raise model.image.max_source_pixels",
        )
    if min(width, height) < 1:
        raise ItemError("image_corrupt", f"an image of {width} x {height} pixels")


def check_header(data: bytes, limits: ImageConfig) -> None:
    """Refuse what would take much memory or time as soon as Pillow opens it: WebP canvases and endless JPEG scans.

    Raises:
        ItemError: ``image_too_large`` or ``image_corrupt``.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and (size := _webp_size(data)) is not None:
        check_area(*size, limits)
    if data.startswith(_JPEG) and (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
        raise ItemError("image_corrupt", f"a JPEG of {scans} scans; the limit is {_MAX_SCANS}; save it again")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def is_cut_short(data: bytes) -> bool:
    """Whether the end of a JPEG or PNG is missing, and some of its pixels are there."""
    if data.startswith(_JPEG):
        start, ended = data.find(b"\xff\xda"), data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
    elif data.startswith(_PNG):
        start, ended = data.find(b"IDAT"), b"IEND" in data[-64:]
    else:
        return False
    return not ended and 0 <= start < len(data) - _FEWEST_PIXEL_BYTES


def without_metadata(data: bytes) -> bytes | None:
    """The file without profile, EXIF and comments, whose parsers can fail where the pixels are fine.

    Returns:
        ``None`` for a format whose metadata cannot be cut out, or that has none.
    """
    if data.startswith(_JPEG):
        kept = b"".join(_jpeg_pieces(data))
    elif data.startswith(_PNG):
        kept = b"".join(_png_pieces(data))
    elif data[4:12] in (b"ftypavif", b"ftypavis"):
        kept = data.replace(b"Exif", b"xxif")  # an item of a type that the decoder does not know is skipped
    else:
        return None
    return None if kept == data else kept


def _jpeg_pieces(data: bytes) -> Iterator[bytes]:
    """All but the application segments and comments; Adobe's (APP14) tells how CMYK is stored."""
    at = 2
    yield data[:2]
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA:  # pixels from here on
            break
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        is_metadata = (0xE0 < marker <= 0xEF and marker != 0xEE) or marker == 0xFE
        if not is_metadata:
            yield data[at : at + 2 + size]
        at += 2 + size
    yield data[at:]


def _png_pieces(data: bytes) -> Iterator[bytes]:
    """The chunks that hold the picture; from a chunk that is not whole on, all bytes."""
    at = 8
    yield data[:8]
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            break
        if data[at + 4 : at + 8] in _PNG_KEPT:
            yield data[at : at + 12 + size]
        at += 12 + size
    yield data[at:]
