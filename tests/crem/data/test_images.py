"""Images: every format becomes the same RGB, and limits are checked before pixels are decoded."""

from __future__ import annotations

import base64
import io
import struct
import zipfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image, ImageFilter

from crem.config import ImageConfig
from crem.data.images import ImageKind, encode_image, load_image, read_bytes
from crem.data.prompts import Segment
from crem.errors import ItemError

LIMITS = ImageConfig()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


RED_PNG = encoded(Image.new("RGB", (4, 3), (255, 0, 0)), "PNG")


def reason(source: object, limits: ImageConfig = LIMITS) -> str:
    with pytest.raises(ItemError) as error:
        load_image(source, limits)  # type: ignore[arg-type]
    assert len(error.value.detail) > 20, "the detail says what is wrong"
    return error.value.reason


def test_palette_with_alpha_is_composited_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    loaded = load_image(encoded(image, "PNG", transparency=1), LIMITS)
    assert loaded.mode == "RGB"
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_half_transparent_black_is_grey() -> None:
    image = Image.new("LA", (1, 1), (0, 128))
    assert load_image(image, LIMITS).getpixel((0, 0)) == (127, 127, 127)


def test_cmyk_jpeg() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = load_image(encoded(cyan, "JPEG", quality=95), LIMITS).getpixel((8, 8))
    assert red < 30 and green > 150 and blue > 150


@pytest.mark.parametrize("options", [{}, {"transparency": 0}], ids=["opaque", "transparency"])
def test_sixteen_bit_grey_keeps_its_shades(options: dict[str, int]) -> None:
    shades = Image.fromarray(np.array([[0, 1 << 14, 1 << 15, 65535]], dtype=np.uint16))
    loaded = np.asarray(load_image(encoded(shades, "PNG", **options), LIMITS))[0, :, 0]
    assert loaded[1:].tolist() == [64, 128, 255]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((0, 255, 0), (0, 0, 255))]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(animated, LIMITS).getpixel((3, 3)) == (0, 255, 0)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
    loaded = load_image(encoded(image, "JPEG", exif=exif), LIMITS)
    assert loaded.size == (20, 40)
    assert min(loaded.getpixel((10, 5))) > 200 and max(loaded.getpixel((10, 35))) < 50  # top white, bottom black


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
def test_extreme_shapes(size: tuple[int, int], tiny_model_dir: str) -> None:
    """Loaded as they are; the collator gives them a shape that the image processor takes."""
    from crem import Item, load

    assert load_image(encoded(Image.new("RGB", size), "PNG"), LIMITS).size == size
    model = load(tiny_model_dir)
    sequence = model.collator.prepare(Item(images=[Image.new("RGB", size)]))
    tokens = int((sequence.prompt.segments == Segment.V).sum()) - 2
    assert 0 < tokens <= 64, "Qwen2-VL keeps the short side at one token, so a sliver is over max_pixels, but bounded"


def huge_png(width: int, height: int) -> bytes:
    """A valid PNG header without the pixels that it declares."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 64), b"IEND"]
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [9_000, 30_000, 60_000])  # over our bound, over Pillow's warning, over Pillow's error
def test_declared_size_is_refused_before_decoding(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _self: pytest.fail("pixels were decoded"))
    with pytest.raises(ItemError, match=r"max_source_pixels") as error:
        load_image(huge_png(side, side), LIMITS)
    assert error.value.reason == "image_too_large"


def test_bytes_are_bounded(tmp_path: Path) -> None:
    limits = ImageConfig(max_source_bytes=50)
    (tmp_path / "a.png").write_bytes(RED_PNG)
    url = "data:image/png;base64," + base64.b64encode(RED_PNG).decode()
    for source in (RED_PNG, tmp_path / "a.png", url):
        assert reason(source, limits) == "image_too_large"
        assert load_image(source, LIMITS).size == (4, 3)


def test_unusable_bytes() -> None:
    jpeg = encoded(Image.effect_noise((64, 64), 90), "JPEG")
    assert reason(b"") == "image_corrupt"
    assert reason(b"not an image at all") == "image_corrupt"
    assert reason(jpeg[: len(jpeg) // 2]) == "image_corrupt"
    assert reason(huge_png(40, 40)) == "image_corrupt"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a.png",
        "HTTPS://example.org/a.png",
        "ftp://example.org/a.png",
        "simplecache::http://127.0.0.1:1/a.png",
        "zip://a.png::https://example.org/a.zip",
        "zip://a.png::simplecache::https://example.org/a.zip",
        "simplecache::s3://bucket/a.png",
        "webhdfs://127.0.0.1:1/a.png",
        "github://owner:name@/a.png",
        "sftp://127.0.0.1/a.png",
        "smb://127.0.0.1/share/a.png",
        "jupyter://127.0.0.1:1/a.png",
        "reference://a.png::s3://bucket/references.json",
        "nosuchscheme://bucket/a.png",
    ],
)
def test_remote_urls_are_refused(url: str) -> None:
    with pytest.raises(ItemError, match="data: URL") as error:
        read_bytes(url, LIMITS)
    assert error.value.reason == "uri_refused"


def test_files_here_are_read_by_path_uri_and_chain(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED_PNG)
    fsspec.filesystem("memory").pipe_file("/images/a.png", RED_PNG)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", RED_PNG)
    inside = f"zip://a.png::file://{tmp_path}/a.zip"
    for uri in (f"{tmp_path}/a.png", f"file://{tmp_path}/a.png", "memory://images/a.png", inside):
        assert read_bytes(uri, LIMITS) == RED_PNG


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert reason(tmp_path / "none.png") == "image_missing"
    assert reason("none.png") == "image_missing"
    assert reason(tmp_path) == "image_missing"


def test_data_urls() -> None:
    good = "data:image/png;base64," + base64.b64encode(RED_PNG).decode()
    assert load_image(good, LIMITS).getpixel((0, 0)) == (255, 0, 0)
    for bad in ("data:image/png,abc", "data:image/png;base64", "data:image/png;base64,%%%"):
        assert reason(bad) == "image_corrupt"


def test_relative_paths_start_at_the_base_folder_or_archive(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(RED_PNG)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("deep/b.png", RED_PNG)
    inside = f"zip://*::{tmp_path}/images.zip"
    assert read_bytes("a.png", LIMITS, base=f"{tmp_path}/images/") == RED_PNG
    assert read_bytes("deep/b.png", LIMITS, base=inside) == RED_PNG
    assert read_bytes(f"{tmp_path}/images/a.png", LIMITS, base=inside) == RED_PNG, "absolute paths ignore the base"
    with pytest.raises(ItemError, match="image_missing"):
        read_bytes("deep/c.png", LIMITS, base=inside)


def test_encoding_is_bounded_and_lossless_when_small() -> None:
    small = Image.effect_noise((50, 30), 90).convert("RGB")
    data, width, height = encode_image(small, 10_000)
    assert (width, height) == (50, 30) and Image.open(io.BytesIO(data)).format == "PNG"
    assert np.array_equal(np.asarray(load_image(data, LIMITS)), np.asarray(small))
    large = Image.effect_noise((1200, 800), 20).convert("RGB")
    for bound, kind in [(400_000, "JPEG"), (10_000, "PNG")]:
        data, width, height = encode_image(large, bound)
        assert 0.95 * bound < width * height <= bound and width / height == pytest.approx(1.5, rel=0.02)
        assert Image.open(io.BytesIO(data)).format == kind and Image.open(io.BytesIO(data)).size == (width, height)
    data, width, height = encode_image(Image.new("RGB", (1, 2000)), 100)
    assert width == 1 and height <= 100, "a sliver keeps to the bound too"


@pytest.mark.parametrize(
    ("kind", "quality", "stored"),
    [("auto", 95, "JPEG"), ("jpeg", 80, "JPEG"), ("png", 95, "PNG"), ("webp", 90, "WEBP"), ("webp", 100, "WEBP")],
)
def test_images_are_stored_as_the_setting_says(kind: ImageKind, quality: int, stored: str) -> None:
    photo = Image.effect_noise((600, 400), 40).convert("RGB").filter(ImageFilter.GaussianBlur(2))
    data, *_ = encode_image(photo, 10**6, kind=kind, quality=quality)
    assert Image.open(io.BytesIO(data)).format == stored
    difference = np.abs(np.asarray(load_image(data, LIMITS)).astype(int) - np.asarray(photo)).max()
    assert difference == 0 if stored == "PNG" or quality == 100 else 0 < difference < 40
    assert encode_image(photo, 10**6, kind=kind, quality=quality)[0] == data, "the same bytes again"


@pytest.mark.parametrize(("kind", "length"), [("auto", 70_000), ("jpeg", 70_000), ("webp", 20_000)])
def test_a_sliver_longer_than_a_format_takes_is_stored_as_png(kind: ImageKind, length: int) -> None:
    data, width, height = encode_image(Image.new("RGB", (length, 10)), 10**6, kind=kind)
    assert (width, height) == (length, 10) == Image.open(io.BytesIO(data)).size
    assert Image.open(io.BytesIO(data)).format == "PNG"
