"""Decodes mutated images in a process of its own with a bound on memory, and prints what became of them.

    python -m tests.crem.data.image_fuzz COUNT SEED

Bits are flipped, bytes overwritten with extremes, files cut, and pieces of other files inserted, mostly in headers;
half of the PNGs get right checksums, so that a mutation reaches the decoder.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import struct
import sys
import time
import zlib
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

from crem.config import ImageConfig
from crem.data.images import decode_image, encode_image
from crem.errors import ItemError

_SECONDS_AN_IMAGE = 10
_MEMORY = 4 << 30
"""Address space of the process: torch and its threads reserve about a half of it."""


def seeds() -> dict[str, bytes]:
    """A small file of every kind that is read."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    rich: dict[str, Any] = {"icc_profile": profile, "exif": exif}
    alpha = noise.convert("RGBA")
    alpha.putalpha(128)
    wide = Image.fromarray(rng.integers(0, 65535, (24, 32), np.uint16))
    several: dict[str, Any] = {"save_all": True, "append_images": [noise.rotate(90), noise.rotate(180)]}
    images: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png": (noise, "PNG", rich),
        "png alpha": (alpha, "PNG", {}),
        "png palette": (noise.quantize(16), "PNG", {"transparency": 3}),
        "png 16": (wide, "PNG", {}),
        "png animated": (noise, "PNG", several),
        "jpeg": (noise, "JPEG", rich),
        "jpeg progressive": (noise, "JPEG", {"progressive": True}),
        "jpeg cmyk": (noise.convert("CMYK"), "JPEG", {}),
        "mpo": (noise, "MPO", several),
        "webp": (noise, "WEBP", rich),
        "webp lossless": (alpha, "WEBP", {"lossless": True}),
        "webp animated": (noise, "WEBP", several),
        "gif": (noise, "GIF", {}),
        "gif animated": (noise.quantize(8), "GIF", several),
        "bmp": (noise, "BMP", {}),
        "bmp palette": (noise.quantize(16), "BMP", {}),
        "ppm": (noise, "PPM", {}),
        "tiff": (noise, "TIFF", rich),
        "tiff float": (Image.fromarray(rng.random((24, 32), np.float32)), "TIFF", {}),
        "tiff 16": (wide, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff pages": (noise, "TIFF", {**several, "compression": "tiff_lzw"}),
        "tiff jpeg": (noise, "TIFF", {"compression": "jpeg"}),
        "tiff group 4": (noise.convert("1"), "TIFF", {"compression": "group4"}),
    }
    if features.check("avif"):
        images |= {
            "avif": (noise, "AVIF", rich),
            "avif animated": (noise, "AVIF", several),
            "avif alpha": (alpha, "AVIF", {}),
        }
    found = {}
    for name, (image, kind, options) in images.items():
        out = io.BytesIO()
        # copies: Pillow keeps the options of an earlier save in the image
        frames = {"append_images": [f.copy() for f in options["append_images"]]} if "append_images" in options else {}
        image.copy().save(out, kind, **options | frames)
        found[name] = out.getvalue()
    return found


def mutated(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One mutation or several, most of them near the start of the file."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        if len(changed) < 16:
            break
        at = min(len(changed) - 9, int(len(changed) * draw.random() ** draw.choice((1, 4))))
        match draw.randrange(6):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                value = draw.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, draw.getrandbits(32)))
                changed[at : at + 4] = struct.pack(draw.choice("<>") + "I", value)
            case 2:
                del changed[at : at + draw.randrange(1, 64)]
            case 3:
                other = draw.choice(others)
                start = draw.randrange(len(other))
                changed[at:at] = other[start : start + draw.randrange(1, 256)]
            case 4:
                changed[at : at + 8] = draw.randbytes(8)
            case 5:
                del changed[max(1, draw.randrange(len(changed))) :]
    return _with_checksums(bytes(changed)) if draw.random() < 0.5 else bytes(changed)


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have right checksums; other files as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            break
        body = data[at + 4 : at + 8 + size]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return bytes(out + data[at:])


def main(count: int, seed: int) -> None:
    """Print a JSON object of what became of ``count`` images, the slowest one and the growth of memory."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    files = seeds()
    names, all_files = sorted(files), list(files.values())
    draw = random.Random(seed)
    limits = [ImageConfig(max_source_pixels=4_000_000, allow_truncated=tolerant) for tolerant in (False, True)]
    for name in names:
        encode_image(decode_image(files[name], limits[0]).image, 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(count):
        data = mutated(files[names[number % len(names)]], all_files, draw)
        began = time.monotonic()
        signal.alarm(_SECONDS_AN_IMAGE)
        try:
            decoded = decode_image(data, limits[number % 2])
            assert decoded.image.mode == "RGB" and decoded.image.size >= (1, 1)
            encode_image(decoded.image, 1 << 20)
            outcomes["truncated" if decoded.truncated else "image"] += 1
        except ItemError as error:
            assert len(error.detail) <= 300, error.detail
            outcomes[error.reason] += 1
        except BaseException:
            sys.stderr.write(f"image {number} ({names[number % len(names)]}): {data[:4000].hex()}\n")
            raise
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.monotonic() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sys.stdout.write(json.dumps({"outcomes": outcomes, "slowest_s": round(slowest, 2), "grown_kib": grown}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
