"""Reading images safely: bytes are bounded before they are read, pixels before they are decoded.

Only the schemes of ``_SCHEMES`` are read: a server that fetches any client's URI (``http``, ``webhdfs``, ``sftp``, …)
can be used to attack its own network, and a batch job that does so depends on foreign machines. ``data:`` URLs,
paths, object-store URIs and files inside archives there are read. fsspec's caching schemes are refused: they copy the
entire file to disk before its size is known.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
import warnings

import fsspec
from PIL import Image, ImageOps, UnidentifiedImageError

from crem.config import ImageConfig
from crem.data.items import ImageSource
from crem.errors import ItemError

__all__ = ["encode_image", "load_image", "read_bytes"]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_SCHEMES = frozenset({"file", "local", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "zip", "tar", "memory"})
_LOSSLESS_PIXELS = 256 * 256
"""Images up to this area are stored as PNG (drawings, icons); larger ones as JPEG."""


def load_image(source: ImageSource, limits: ImageConfig, *, base: str | None = None) -> Image.Image:
    """Read one image as RGB, upright (EXIF) and composited on white.

    Args:
        source: image, encoded bytes, path, URI or data URL.
        limits: bounds on bytes and pixels.
        base: folder or URI that relative paths start from; a ``*`` in it is replaced by the path, which addresses
            a file inside an archive: ``zip://*::s3://bucket/images.zip``.

    Raises:
        ItemError: ``image_missing``, ``uri_unreadable``, ``uri_refused``, ``image_too_large`` or ``image_corrupt``.
    """
    if isinstance(source, Image.Image):
        _check_area(source, limits)
        return _flatten(source)
    data = source if isinstance(source, bytes) else read_bytes(str(source), limits, base=base)
    if not data:
        raise ItemError("image_corrupt", "the image has 0 bytes; upload it again")
    if len(data) > limits.max_source_bytes:
        raise _too_many_bytes(len(data), limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound, below, is lower
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_area(image, limits)
                # a large JPEG that the model will shrink anyway is decoded at a fraction of its size
                scale = math.sqrt(limits.max_pixels / max(1, image.width * image.height))
                if scale < 0.5:
                    image.draft("RGB", (math.ceil(image.width * scale * 2), math.ceil(image.height * scale * 2)))
                image.load()
                return _flatten(image)
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
        raise ItemError("image_corrupt", f"{type(error).__name__} while decoding {len(data)} bytes: {error}") from error


def read_bytes(uri: str, limits: ImageConfig, *, base: str | None = None) -> bytes:
    """Read an encoded image from a path, an fsspec URI or a data URL, never more than ``limits.max_source_bytes``."""
    if uri.startswith("data:"):
        return _decode_data_url(uri, limits)
    schemes = _schemes(uri)
    if refused := sorted(schemes - _SCHEMES):
        raise ItemError(
            "uri_refused",
            f"{refused[0]} URIs are not fetched ({uri[:80]!r}), only {', '.join(sorted(_SCHEMES))}; "
            "download it, or send it as a data: URL",
        )
    if not schemes and base is not None and not os.path.isabs(uri):
        uri = base.replace("*", uri) if "*" in base else f"{base.rstrip('/')}/{uri}"
    try:
        with fsspec.open(uri, "rb") as file:
            data: bytes = file.read(limits.max_source_bytes + 1)
    except FileNotFoundError as error:
        raise ItemError("image_missing", f"{uri!r} does not exist") from error
    except Exception as error:  # botocore, zipfile and OS errors alike make the row unreadable
        raise ItemError("uri_unreadable", f"{uri!r}: {type(error).__name__}: {error}") from error
    if len(data) > limits.max_source_bytes:
        raise _too_many_bytes(len(data), limits)
    return data


def _schemes(uri: str) -> set[str]:
    """The scheme of every part of a chain such as ``zip://a.png::s3://bucket/images.zip``; none of a plain path."""
    parts = uri.split("::")
    schemes = {part.partition("://")[0].lower() for part in parts if "://" in part}
    if len(parts) > 1:  # fsspec reads a bare name in a chain as a scheme: simplecache::s3://bucket/a.png
        schemes |= {part.lower() for part in parts if re.fullmatch(r"[\w+-]+", part)}
    return schemes


def encode_image(image: Image.Image, max_pixels: int) -> tuple[bytes, int, int]:
    """Encode an RGB image, shrunk to at most ``max_pixels``: PNG when small (lossless), else JPEG quality 95.

    Returns:
        the bytes, and the stored width and height in pixels.
    """
    area = image.width * image.height
    if area > max_pixels:
        scale = math.sqrt(max_pixels / area)
        width, height = (max(1, int(side * scale)) for side in image.size)
        width = max(1, min(width, max_pixels // height))  # the short side of a sliver cannot shrink further
        image = image.resize((width, min(height, max_pixels // width)), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if image.width * image.height <= _LOSSLESS_PIXELS:
        image.save(out, "PNG", compress_level=3)
    else:
        image.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue(), image.width, image.height


def _check_area(image: Image.Image, limits: ImageConfig) -> None:
    area = image.width * image.height
    if area > limits.max_source_pixels:
        raise ItemError(
            "image_too_large",
            f"{image.width} x {image.height} = {area} pixels is over the limit of {limits.max_source_pixels}; "
            "shrink it or raise model.image.max_source_pixels",
        )
    if min(image.width, image.height) < 1:
        raise ItemError("image_corrupt", f"an image of {image.width} x {image.height} pixels")


def _too_many_bytes(size: int, limits: ImageConfig) -> ItemError:
    return ItemError(
        "image_too_large",
        f"more than {min(size, limits.max_source_bytes)} bytes; the limit is {limits.max_source_bytes}; "
        "shrink it or raise model.image.max_source_bytes",
    )


def _flatten(image: Image.Image) -> Image.Image:
    """RGB, upright, transparency on white, first frame."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):  # 16-bit greys: PIL's own convert clips them to white
        image = image.convert("F").point(lambda v: v / 256).convert("L") if image.mode != "F" else image.convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _decode_data_url(url: str, limits: ImageConfig) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ItemError("image_corrupt", "a data: URL must be 'data:image/<type>;base64,<payload>'")
    if len(payload) * 3 // 4 > limits.max_source_bytes:
        raise _too_many_bytes(len(payload) * 3 // 4, limits)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ItemError("image_corrupt", f"the data: URL's payload is not base64: {error}") from error
