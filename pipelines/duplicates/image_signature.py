"""Perceptual signatures of images: what two pictures are compared by without being decoded again.

A signature is a difference hash (dHash, 64 bits: the sign of the brightness gradient on a 9 x 8 grid), a DCT hash
(pHash, 64 bits) and the mean colours of a 4 x 4 grid. The hashes are those of ``imagehash``. On 2,400 real drawings
(tests/bench/README.md) dHash survives re-encoding, shrinking, cropping and brightening better than pHash, whose bits
are noise where a drawing is symmetric. A hash of brightness alone takes a red heart for a blue one: colours tell them
apart.

A JPEG is decoded at a fraction of its size (Pillow's draft mode), since 32 x 32 pixels are enough for all three.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.duplicates.hamming_tables import hamming_keys, hamming_tables
from pipelines.duplicates.libraries import library

__all__ = ["IMAGE_SIGNATURE", "ImageRelation", "image_signature"]

_DECODED_SIDE = 64
_GRID = 4
IMAGE_SIGNATURE = np.dtype(
    [("dhash", "<u8"), ("phash", "<u8"), ("colours", "u1", (_GRID, _GRID, 3)), ("log_aspect", "<f4")]
)
"""Fixed layout of a signature; ``colours`` are the means of Y, Cb and Cr, ``log_aspect`` that of width / height."""

# Bounds of the comparison beside the bits of the dHash. On the 2,400 drawings 99 % of re-encoded, halved, cropped (2 %)
# and brightened (10 %) copies are within all of them.
_PHASH_BITS = 16
_BRIGHTNESS = 24.0
"""Largest mean difference of brightness, of 255."""
_PATTERN = 8.0
"""Largest mean difference of brightness once the difference of the means is taken off."""
_COLOUR = 16
"""Largest difference of any cell's Cb or Cr."""
_LOG_ASPECT = 0.05
_FINEST = 2**40
"""Number of hashes for which the finest tables are made."""


def image_signature(data: bytes, width: int, height: int) -> NDArray[np.void]:
    """The signature of a stored image.

    Args:
        data: encoded bytes.
        width: of the stored image, in pixels.
        height: of the stored image, in pixels.

    Returns:
        one element of ``IMAGE_SIGNATURE``.
    """
    imagehash = library("imagehash", "prepare.near_duplicates")
    with Image.open(io.BytesIO(data)) as opened:
        opened.draft("RGB", (2 * _DECODED_SIDE, 2 * _DECODED_SIDE))
        image = opened.convert("RGB")
    factor = min(image.size) // _DECODED_SIDE
    if factor > 1:
        image = image.reduce(factor)
    colours = image.convert("YCbCr").resize((_GRID, _GRID), Image.Resampling.BOX)
    grey = image.convert("L")
    return np.array(
        (
            _bits(imagehash.dhash(grey).hash),
            _bits(imagehash.phash(grey).hash),
            np.asarray(colours),
            np.log(width / height),
        ),
        IMAGE_SIGNATURE,
    )


def _bits(hash_: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(hash_).tobytes(), "big")


@dataclass(frozen=True)
class ImageRelation:
    """Whether two signatures are those of near-identical images."""

    bits: int
    """Largest distance of the dHashes."""

    def near(self, signatures: NDArray[np.void], i: NDArray[np.intp], j: NDArray[np.intp]) -> NDArray[np.bool_]:
        """[P] whether ``signatures[i]`` and ``signatures[j]`` are near, for places i [P] and j [P]."""
        hashes = signatures["dhash"]
        near: NDArray[np.bool_] = np.bitwise_count(hashes[i] ^ hashes[j]) <= self.bits
        found = np.flatnonzero(near)
        if len(found):
            near[found] = _near_in_detail(signatures[i[found]], signatures[j[found]])
        return near

    def finer_keys(self, signatures: NDArray[np.void]) -> NDArray[np.int64]:
        """[tables, N] under which all near signatures meet."""
        return hamming_keys(signatures["dhash"], hamming_tables(_FINEST, self.bits))


def _near_in_detail(a: NDArray[np.void], b: NDArray[np.void]) -> NDArray[np.bool_]:
    difference = a["colours"].astype(np.int16) - b["colours"]
    brightness = difference[..., 0].astype(np.float32)
    pattern = brightness - brightness.mean((1, 2), keepdims=True)
    near: NDArray[np.bool_] = (
        (np.bitwise_count(a["phash"] ^ b["phash"]) <= _PHASH_BITS)
        & (np.abs(brightness).mean((1, 2)) <= _BRIGHTNESS)
        & (np.abs(pattern).mean((1, 2)) <= _PATTERN)
        & (np.abs(difference[..., 1:]).max((1, 2, 3)) <= _COLOUR)
        & (np.abs(a["log_aspect"] - b["log_aspect"]) <= _LOG_ASPECT)
    )
    return near
