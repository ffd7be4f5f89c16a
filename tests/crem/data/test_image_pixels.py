"""Every mode, range and profile becomes the same RGB."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from crem.config import ImageConfig
from crem.data.images import decode_image, load_image

LIMITS = ImageConfig()
RAMP = np.linspace(0, 1, 96, dtype=np.float32)[None].repeat(64, 0)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(load_image(data, LIMITS)).astype(int)


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
@pytest.mark.parametrize(
    "values",
    [
        RAMP,
        RAMP * 255,
        RAMP * 1.03,  # resampling overshoots
        RAMP * 2 - 1,
        RAMP * 4,  # light
        RAMP * 1e9,
        RAMP * 700 - 350,
        (RAMP * 255).astype(np.int32),
        (RAMP * 65535).astype(np.int32),
        (RAMP.astype(np.float64) * (2**31 - 1)).astype(np.int32),
        (RAMP * 255).astype(np.uint16),
        (RAMP * 4095).astype(np.uint16),
        (RAMP * 65535).astype(np.uint16),
    ],
    ids=lambda values: f"{values.dtype} {values.min():.0f} to {values.max():.2g}",
)
def test_a_ramp_of_any_range_is_a_ramp(values: np.ndarray, kind: str) -> None:
    if kind == "PNG" and values.dtype != np.uint16:
        pytest.skip("PNG holds no such values")
    shades = pixels(encoded(Image.fromarray(values), kind))
    assert shades.mean() == pytest.approx(127.5, abs=4)
    assert np.abs(shades[:, :, 0] - np.round(RAMP * 255)).max() <= 8
    assert (shades[0, 0, 0], shades[0, -1, 0]) == (0, 255)


def test_what_is_no_number_does_not_change_the_range() -> None:
    values = RAMP.copy()
    values[0, :4] = np.nan, np.inf, -np.inf, -0.02
    shades = pixels(encoded(Image.fromarray(values), "TIFF"))[:, :, 0]
    assert shades[0, :4].tolist() == [0, 255, 0, 0] and shades[1:].mean() == pytest.approx(127.5, abs=1)
    nothing = pixels(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))
    assert nothing.max() == 0


def test_a_tiff_whose_zero_is_white() -> None:
    grey = Image.fromarray((RAMP * 65535).astype(np.uint16))
    inverted = pixels(encoded(grey, "TIFF", tiffinfo={262: 0}))
    assert inverted[0, 0, 0] > 250 > 5 > inverted[0, -1, 0]


def test_sixteen_bit_png_with_alpha() -> None:
    """Written by hand: Pillow has no such mode."""
    row = struct.pack(">8H", 65535, 0, 0, 65535, 0, 0, 0, 0)  # a red pixel, and a transparent black one

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 6, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    )
    assert pixels(png).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F", "RGB"])
def test_white_is_white_in_every_mode(mode: str) -> None:
    if mode == "LAB":
        white = Image.new("LAB", (4, 4), (255, 128, 128))
    elif mode in ("I;16", "I", "F"):
        white = Image.fromarray(np.full((4, 4), 255, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    else:
        white = Image.new("RGB", (4, 4), "white").convert(mode)
    before = (white.mode, dict(white.info))
    loaded = np.asarray(load_image(white, LIMITS))
    assert loaded.shape == (4, 4, 3) and loaded.min() >= 253
    assert (white.mode, white.info) == before, "the caller's image is as it was"


def swapped_profile() -> bytes:
    """sRGB with red and green exchanged: a picture that ignores it has the wrong colours."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    at = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = at[b"rXYZ"], at[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


CONTAINERS = ["PNG", "JPEG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_profile_is_converted_to_srgb_once(kind: str) -> None:
    red = Image.new("RGB", (32, 32), (250, 10, 10))
    data = encoded(red, kind, icc_profile=swapped_profile())
    colour = pixels(data)[16, 16]
    assert colour[1] > 235 and colour[0] < 40, "its red is the profile's green"
    stored = io.BytesIO()
    load_image(data, LIMITS).save(stored, "PNG")
    assert np.abs(pixels(stored.getvalue())[16, 16] - colour).max() <= 1, "stored pixels carry no profile"


def test_a_profile_leaves_transparency_alone() -> None:
    clear = Image.new("RGBA", (8, 8), (250, 10, 10, 0))
    assert pixels(encoded(clear, "PNG", icc_profile=swapped_profile())).min() == 255


def test_the_profile_of_srgb_changes_no_pixel() -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(encoded(noise, "PNG", icc_profile=profile)), pixels(encoded(noise, "PNG")))


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize(
    "profile", [b"", b"no profile" * 20, swapped_profile()[:200], b"\0" * 5000], ids=["none", "text", "cut", "zeros"]
)
def test_a_damaged_profile_is_ignored(kind: str, profile: bytes) -> None:
    data = encoded(Image.new("RGB", (32, 32), (250, 10, 10)), kind, icc_profile=profile)
    assert pixels(data)[16, 16, 0] > 235


def test_a_grey_picture_with_a_profile_of_colours() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("PNG", "JPEG"):
        data = encoded(Image.new("L", (16, 16), 128), kind, icc_profile=profile)
        assert np.abs(pixels(data) - 128).max() <= 1


def test_a_cmyk_jpeg_with_a_profile_of_colours() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", icc_profile=swapped_profile())
    assert pixels(data)[8, 8, 0] > 200, "a profile of another kind than the picture is ignored"


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,  # 65,535 entries
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",  # orientation is text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # orientation is 99
        b"Exif\0\0II*\0\xff\xff\xff\x7f",  # the directory is outside
        b"Exif\0\0garbage",
    ],
    ids=["entries", "text", "99", "outside", "garbage"],
)
def test_odd_exif_does_not_make_a_picture_corrupt(kind: str, exif: bytes) -> None:
    if kind == "TIFF":
        data = encoded(Image.new("RGB", (32, 16), (250, 10, 10)), kind, tiffinfo={0x8769: 123456, 0x9003: "odd"})
    else:
        sane = Image.Exif()
        sane[0x010E] = "x" * len(exif)
        whole = sane.tobytes()
        data = encoded(Image.new("RGB", (32, 16), (250, 10, 10)), kind, exif=whole)
        inside = whole.removeprefix(b"Exif\0\0")
        assert inside in data
        data = data.replace(inside, exif.removeprefix(b"Exif\0\0").ljust(len(inside), b"\0"))
        if kind == "PNG":  # with a right checksum
            at = data.index(b"eXIf")
            size = int.from_bytes(data[at - 4 : at], "big")
            data = (
                data[: at + 4 + size] + struct.pack(">I", zlib.crc32(data[at : at + 4 + size])) + data[at + 8 + size :]
            )
    assert load_image(data, LIMITS).size == (32, 16)
    assert pixels(data)[8, 8, 0] > 235


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", CONTAINERS)
def test_orientation_of_every_container(kind: str, orientation: int) -> None:
    image = Image.new("RGB", (48, 32), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif}
    shown = load_image(encoded(image, kind, **options), LIMITS)
    assert shown.size == ((48, 32) if orientation < 5 else (32, 48))
    width, height = shown.size
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    bright = [
        (x, y) for x in (0, 1) for y in (0, 1) if shown.getpixel((3 + x * (width - 7), 3 + y * (height - 7)))[0] > 128
    ]
    assert bright == [corner]


def test_first_of_several_pages_and_pictures() -> None:
    first, second = (Image.new("RGB", (20, 20), colour) for colour in ((250, 0, 0), (0, 0, 250)))
    for kind in ("TIFF", "MPO", "GIF", "WEBP", "PNG", *CONTAINERS[4:]):
        data = encoded(first, kind, save_all=True, append_images=[second])
        decoded = decode_image(data, LIMITS)
        assert decoded.image.getpixel((10, 10))[0] > 230 and (decoded.width, decoded.height) == (20, 20), kind
