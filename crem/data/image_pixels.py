"""From a decoded picture in any mode to what the model reads: RGB in sRGB, 8 bits, upright, transparency on white.

- **Range.** Greys of 16 or 32 bits and floats are scaled by the largest value M that occurs: M ≤ 1 means 0..1,
  M ≤ 255 means 0..255, M ≤ 4095 means 12 bits, M ≤ 65535 means 16 bits, and anything larger is divided by M. A float
  may pass its bound by 5 % (resampling overshoots), and a float with 1.05 < M ≤ 16 is taken for light without an upper
  bound and divided by M. Values below zero down to 5 % of M become black; otherwise floats in -1..1 are shifted, and
  any other range is stretched from the smallest to the largest. NaN counts as 0, infinity as the largest finite value.
- **Colour.** An embedded ICC profile is converted to sRGB; one that is damaged, or of another kind than the picture,
  is ignored. Gamma and chromaticity chunks of PNG, and CICP of AVIF, are ignored.
- **Orientation** is EXIF's; a tag that cannot be read means upright.

Temporary copies are made of bands of rows, so a picture needs at most its own pixels and those of the result
(4 bytes each) beside one band.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

__all__ = ["to_rgb"]

_BAND_PIXELS = 1 << 20
_MAX_PROFILE_BYTES = 4 * 2**20
_ORIENTATION = 0x0112
_PHOTOMETRIC = 262
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BOUNDS = (1.0, 255.0, 4095.0, 65535.0)
_OVERSHOOT = 1.05
_OPEN_LIGHT = 16.0
_WHITE = (255, 255, 255)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB without metadata; the first frame of several."""
    image.load()
    source = image
    turn = _TURNS.get(_orientation(image))
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if profile or image.mode != "RGB" or "transparency" in image.info:
        rgb = Image.new("RGB", image.size)
        for top, band in _bands(image):
            rgb.paste(_band_rgb(band, profile if isinstance(profile, bytes) else b""), (0, top))
        image = rgb
    if turn is not None:
        image = image.transpose(turn)
    elif image is source:
        image = image.copy()
    image.info = {}  # the profile has been applied; Pillow would store it with the pixels
    return image


def _band_rgb(band: Image.Image, profile: bytes) -> Image.Image:
    """A band in sRGB on white."""
    alpha = None
    if band.mode in ("La", "RGBa"):  # premultiplied
        band = band.convert({"La": "LA", "RGBa": "RGBA"}[band.mode])
    if band.has_transparency_data:
        alpha = band.convert("RGBA").getchannel("A")
        if band.mode in ("LA", "PA"):
            band = band.getchannel("L") if band.mode == "LA" else band.convert("RGBA").convert("RGB")
    if band.mode not in ("L", "RGB", "CMYK", "LAB"):
        band = band.convert("L" if band.mode == "1" else "RGB")
    transform = _to_srgb(profile, band.mode) if profile or band.mode == "LAB" else None
    if transform is None and profile and band.mode == "L":  # a grey picture often carries an RGB profile
        band = band.convert("RGB")
        transform = _to_srgb(profile, "RGB")
    rgb = band.convert("RGB") if transform is None else ImageCms.applyTransform(band, transform) or band
    if alpha is None:
        return rgb
    white = Image.new("RGB", band.size, _WHITE)
    white.paste(rgb, mask=alpha)
    return white


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a profile; ``None`` where it changes nothing or cannot be used for the mode."""
    if len(profile) > _MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # damaged, or of another kind than the picture; the library raises several types
        return None
    if mode != "RGB":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform), np.int16)
    return None if np.abs(converted - colours).max() <= 1 else transform


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # odd tags raise whatever the parser stumbles over; the picture is fine
        return 1
    return value if isinstance(value, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of wide values as ``L``; a transparent shade stays transparent."""
    whole = image.mode != "F"
    smallest, largest = _extrema(image)
    low, high = _range(smallest, largest, whole=whole)
    out = np.empty((image.height, image.width), np.uint8)
    for top, band in _bands(image):
        values = np.nan_to_num(np.asarray(band, np.float32), nan=0.0, posinf=largest, neginf=smallest)
        with np.errstate(all="ignore"):  # the largest floats overflow, and are clipped
            values = np.clip((values - low) * (255 / (high - low)) + 0.5, 0, 255)
        out[top : top + band.height] = values.astype(np.uint8)
    if _is_white_zero(image):
        np.subtract(255, out, out=out)
    grey = Image.fromarray(out)
    shade = image.info.get("transparency")
    if isinstance(shade, int):
        alpha = np.empty_like(out)
        for top, band in _bands(image):
            alpha[top : top + band.height] = np.where(np.asarray(band) == shade, 0, 255)
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _extrema(image: Image.Image) -> tuple[float, float]:
    """The smallest and the largest finite value; (0, 0) where none is finite."""
    found: list[float] = []
    for _, band in _bands(image):
        values = np.asarray(band)
        if image.mode == "F":
            values = values[np.isfinite(values)]
        if values.size:
            found += [float(values.min()), float(values.max())]
    return (min(found), max(found)) if found else (0.0, 0.0)


def _range(smallest: float, largest: float, *, whole: bool) -> tuple[float, float]:
    """The values that become black and white."""
    slack = 1.0 if whole else _OVERSHOOT
    if smallest < 0 and smallest < -0.05 * largest:
        return (-1.0, 1.0) if smallest >= -slack and largest <= slack and not whole else (smallest, largest + 1e-9)
    if not whole and _OVERSHOOT < largest <= _OPEN_LIGHT:
        return 0.0, largest
    return 0.0, next((bound for bound in _BOUNDS if largest <= bound * slack), largest)


def _is_white_zero(image: Image.Image) -> bool:
    """Whether a TIFF's zero is white; Pillow inverts these itself up to 8 bits."""
    tags: Any = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(_PHOTOMETRIC) == 0


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Bands of rows from top to bottom, each with the number of its first row."""
    rows = max(1, _BAND_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))
