"""Decoding and encoding images: the size that a header declares is bounded before pixels are decoded.

Decoding holds the file, the decoded picture and its RGB copy, 4 bytes a pixel each: measured in whole processes 8
bytes a pixel for JPEG, 9 for PNG, 11 for AVIF, 13 for JPEG with a profile and a turn, and 17 for WebP, whose decoder
keeps two canvases. So the default limit of 64 million pixels bounds a decode at 1.1 GB; 12 million pixels take 0.1 to
0.2 GB. A JPEG that will be shrunk to less than a quarter of its side is decoded at a fraction of its size.

Metadata never makes a fine picture corrupt: where decoding fails, it is tried again without the metadata.
"""

from __future__ import annotations

import io
import math
import threading
import warnings
from dataclasses import dataclass
from typing import Literal, TypeAlias

from PIL import Image, ImageFile, UnidentifiedImageError, features

from crem.config import ImageConfig
from crem.data.image_bytes import read_bytes, too_many_bytes
from crem.data.image_headers import check_area, check_header, is_cut_short, without_metadata
from crem.data.image_pixels import to_rgb
from crem.data.items import ImageSource
from crem.errors import ItemError, shortened

__all__ = ["DecodedImage", "ImageKind", "decode_image", "encode_image", "load_image", "read_bytes"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(("AVIF",) if features.check("avif") else ()))
ImageKind: TypeAlias = Literal["auto", "jpeg", "png", "webp"]
"""How an image is stored."""
_LONGEST_SIDE = {"jpeg": 65_500, "webp": 16_383, "png": 2**31 - 1}
"""Pixels; a longer sliver is stored as PNG."""
_LOSSLESS_PIXELS = 256 * 256
"""Images up to this area are stored as PNG (drawings, icons); larger ones as JPEG."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323
"""TIFF tags."""
_TRUNCATED_LOCK = threading.Lock()
"""Pillow's switch for truncated files is one per process."""


@dataclass(frozen=True)
class DecodedImage:
    """A picture in RGB, and what was found in its file."""

    image: Image.Image
    width: int
    """Pixels that the file declares, before it was turned upright or decoded at a fraction of its size."""
    height: int
    truncated: bool = False
    """Whether the end of the file is missing; the pixels from there on are grey or black."""


def load_image(source: ImageSource, limits: ImageConfig, *, base: str | None = None) -> Image.Image:
    """Read one image as RGB: in sRGB, upright (EXIF) and on white.

    Args:
        source: image, encoded bytes, path, URI, ``data:`` URL or base64.
        limits: bounds on bytes and pixels.
        base: folder or URI that relative paths start from; a ``*`` in it is replaced by the path, which addresses
            a file inside an archive: ``zip://*::s3://bucket/images.zip``.

    Raises:
        ItemError: ``image_missing``, ``uri_refused``, ``image_too_large`` or ``image_corrupt``.
        StorageError: the store cannot be asked.
    """
    if isinstance(source, Image.Image):
        check_area(source.width, source.height, limits)
        return to_rgb(source)
    data = source if isinstance(source, bytes) else read_bytes(str(source), limits, base=base)
    return decode_image(data, limits).image


def decode_image(data: bytes, limits: ImageConfig) -> DecodedImage:
    """Decode an image file of a known format. A truncated one is an error, unless ``limits.allow_truncated`` is set.

    Raises:
        ItemError: ``image_too_large`` or ``image_corrupt``.
    """
    if not data:
        raise ItemError("image_corrupt", "the image has 0 bytes; upload it again")
    if len(data) > limits.max_source_bytes:
        raise too_many_bytes(len(data), limits)
    check_header(data, limits)
    try:
        if limits.allow_truncated:
            with _TRUNCATED_LOCK:
                return _decode(data, limits)
        return _decode(data, limits)
    except ItemError as error:
        if error.reason != "image_corrupt":
            raise
        bare = without_metadata(data)
        if bare is not None:
            try:
                return _decode(bare, limits)
            except ItemError:
                pass
        if limits.allow_truncated and is_cut_short(data):
            return _decode_truncated(bare or data, limits)
        raise


def _decode(data: bytes, limits: ImageConfig) -> DecodedImage:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs (our own bound is lower) and of odd metadata
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                check_area(image.width, image.height, limits)
                _check_tiles(image, limits)
                width, height = image.size
                # a large JPEG that the model will shrink anyway is decoded at a fraction of its size
                scale = math.sqrt(limits.max_pixels / max(1, width * height))
                if scale < 0.5:
                    image.draft("RGB", (math.ceil(width * scale * 2), math.ceil(height * scale * 2)))
                return DecodedImage(to_rgb(image), width, height)
    except ItemError:
        raise
    except Image.DecompressionBombError as error:  # Pillow checks its own bound while it reads the header
        raise ItemError(
            "image_too_large", f"{error} model.image.max_source_pixels={limits.max_source_pixels} is lower; shrink it"
        ) from error
    except UnidentifiedImageError as error:
        raise ItemError(
            "image_corrupt", f"{len(data)} bytes that are not an image of a known format ({', '.join(_FORMATS)})"
        ) from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, …
        told = shortened(f"{type(error).__name__} while decoding {len(data)} bytes: {error}")
        hint = "; model.image.allow_truncated=true takes what there is of it" if is_cut_short(data) else ""
        raise ItemError("image_corrupt", told + hint) from error


def _decode_truncated(data: bytes, limits: ImageConfig) -> DecodedImage:
    """Decode what there is of a truncated file; a file of which nothing can be seen stays corrupt."""
    with _TRUNCATED_LOCK:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            decoded = _decode(data, limits)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
    if len(decoded.image.getcolors(2) or (0, 0)) == 1:
        raise ItemError("image_corrupt", f"{len(data)} bytes hold a header and no pixels of the image; upload it again")
    return DecodedImage(decoded.image, decoded.width, decoded.height, truncated=True)


def encode_image(
    image: Image.Image, max_pixels: int, *, kind: ImageKind = "auto", quality: int = 95
) -> tuple[bytes, int, int]:
    """Encode an RGB image, shrunk to at most ``max_pixels``.

    ``auto`` is PNG for small images (lossless: drawings, icons), else JPEG. What the kinds cost is measured by
    ``tests.bench.bench_images``.

    Args:
        quality: of JPEG and WebP, 1 to 100; colours are stored at full resolution in JPEG. A WebP of 100 is lossless.

    Returns:
        the bytes, and the stored width and height in pixels.
    """
    area = image.width * image.height
    if area > max_pixels:
        scale = math.sqrt(max_pixels / area)
        width, height = (max(1, int(side * scale)) for side in image.size)
        width = max(1, min(width, max_pixels // height))  # the short side of a sliver cannot shrink further
        image = image.resize((width, min(height, max_pixels // width)), Image.Resampling.BICUBIC)
    if kind == "auto":
        kind = "png" if image.width * image.height <= _LOSSLESS_PIXELS else "jpeg"
    if max(image.size) > _LONGEST_SIDE[kind]:
        kind = "png"
    out = io.BytesIO()
    if kind == "png":
        image.save(out, "PNG", compress_level=3)
    elif kind == "webp":
        image.save(out, "WEBP", quality=quality, lossless=quality == 100, method=4)
    else:
        image.save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue(), image.width, image.height


def _check_tiles(image: Image.Image, limits: ImageConfig) -> None:
    """Refuse a TIFF whose tiles are larger than an image may be: a decoder allocates a whole tile at a time."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return
    width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    if isinstance(width, int) and isinstance(height, int) and width * height > 0:
        check_area(width, height, limits)
