"""Bounds that hold before a decoder allocates, and files whose end is missing."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from crem.config import ImageConfig
from crem.data.images import decode_image
from crem.errors import ItemError

LIMITS = ImageConfig()
TOLERANT = ImageConfig(allow_truncated=True)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def reason(data: bytes, limits: ImageConfig = LIMITS) -> str:
    with pytest.raises(ItemError) as error:
        decode_image(data, limits)
    assert len(error.value.detail) <= 300
    return error.value.reason


NOISE = Image.effect_noise((320, 240), 90).convert("RGB")


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "TIFF", "GIF", "BMP", "PPM", "PNG", "JPEG"])
def test_the_bound_on_pixels_holds_for_every_container(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    data = encoded(NOISE, kind)
    monkeypatch.setattr("crem.data.images.to_rgb", lambda _image: pytest.fail("pixels were decoded"))
    assert reason(data, ImageConfig(max_source_pixels=320 * 240 - 1)) == "image_too_large"


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_canvas_is_refused_before_pillow_makes_one(lossless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encoded(NOISE, "WEBP", lossless=lossless))
    if lossless:
        data[21:25] = struct.pack("<I", 16383 | 16383 << 14)
    else:
        data[26:30] = struct.pack("<HH", 16383, 16383)
    monkeypatch.setattr("PIL.Image.open", lambda *_args, **_kw: pytest.fail("Pillow was asked"))
    assert reason(bytes(data)) == "image_too_large"


def test_a_tiff_tile_larger_than_an_image_may_be() -> None:
    """Eight by eight pixels in one tile of 65,520 x 65,520, written by hand."""
    pixels = zlib.compress(bytes(64))
    tags = [(256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (277, 1), (322, 65520), (323, 65520), (324, 8)]
    tags.append((325, len(pixels)))
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = (
        struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + directory + bytes(4)
    )
    assert reason(data) == "image_too_large"


def test_a_jpeg_of_endless_scans() -> None:
    data = encoded(NOISE, "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    assert reason(data[:at] + data[at:-2] * 300 + data[-2:]) == "image_corrupt"
    assert decode_image(data, LIMITS).image.size == (320, 240)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})])
@pytest.mark.parametrize("share", [0.5, 0.9, "two bytes"])
def test_a_file_without_its_end_is_tolerated_only_by_the_setting(
    kind: str, options: dict[str, bool], share: float | str
) -> None:
    whole = encoded(NOISE, kind, **options)
    cut = whole[:-2] if isinstance(share, str) else whole[: int(len(whole) * share)]
    if kind == "PNG" and isinstance(share, str):
        cut = whole[:-80]  # its last bytes are checksums that are not needed
    with pytest.raises(ItemError, match=r"allow_truncated=true") as error:
        decode_image(cut, LIMITS)
    assert error.value.reason == "image_corrupt"
    decoded = decode_image(cut, TOLERANT)
    assert decoded.truncated and decoded.image.size == (320, 240)
    top = np.asarray(decode_image(whole, LIMITS).image)[:100].astype(int)
    difference = np.abs(np.asarray(decoded.image)[:100].astype(int) - top)
    assert difference.mean() < (40 if options else 1), "what is there is decoded"
    assert not decode_image(whole, TOLERANT).truncated
    assert reason(cut) == "image_corrupt", "the setting of one call does not reach the next"


def test_a_header_without_pixels_is_not_tolerated() -> None:
    for kind in ("JPEG", "PNG"):
        whole = encoded(NOISE, kind)
        start = whole.index(b"IDAT") + 8 if kind == "PNG" else whole.index(b"\xff\xda") + 14
        for size in (3, 10, start // 2, start, start + 40):
            assert reason(whole[:size], TOLERANT) == "image_corrupt", (kind, size)


def test_other_damage_is_not_tolerated() -> None:
    damaged = bytearray(encoded(NOISE, "PNG"))
    middle = len(damaged) // 2
    damaged[middle : middle + 40] = bytes(40)
    assert reason(bytes(damaged), TOLERANT) == "image_corrupt"


def test_metadata_that_pillow_refuses_does_not_make_a_picture_corrupt() -> None:
    """A text chunk that unpacks to more than Pillow's limit, and the same as a profile."""
    whole = encoded(NOISE, "PNG")
    for kind, body in ((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0")):
        chunk = kind + body + zlib.compress(bytes(80 << 20))
        framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data = whole[:33] + framed + whole[33:]
        assert np.array_equal(np.asarray(decode_image(data, LIMITS).image), np.asarray(NOISE))
