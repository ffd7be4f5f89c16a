"""Decoders and encoders of images: time, bytes, what they change, and what the model makes of the change.

    python -m tests.bench.bench_images [--repeats 5] [--model crem/checkpoints/crem-micro]

The pictures are one photograph (matplotlib's sample) at several sizes. Decoding is from a JPEG to RGB of at most
1,003,520 pixels, the default of ``prepare.encode_max_pixels``; another decoder than Pillow is measured where it is
installed (``pip install simplejpeg pyvips pyvips-binary``). Encoding starts from those pixels. The cosine is that of
the embeddings of the stored and of the lossless picture, the lowest of twelve crops.
"""

from __future__ import annotations

import argparse
import importlib
import io
from collections.abc import Callable
from typing import Any

import matplotlib.cbook
import numpy as np
import torch
from PIL import Image

import crem
from crem.config import ImageConfig
from crem.data.images import ImageKind, decode_image, encode_image
from tests.bench.timing import environment, interleaved, table

PIXELS = 1280 * 28 * 28
LIMITS = ImageConfig(max_pixels=PIXELS)
ENCODINGS: dict[str, tuple[ImageKind, int]] = {
    "auto (JPEG 95)": ("auto", 95),
    "JPEG 90": ("jpeg", 90),
    "JPEG 80": ("jpeg", 80),
    "WebP 95": ("webp", 95),
    "WebP 90": ("webp", 90),
    "WebP 80": ("webp", 80),
    "WebP lossless": ("webp", 100),
    "PNG": ("png", 95),
}
Decoder = Callable[[bytes], np.ndarray]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="crem/checkpoints/crem-micro")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[600, 1200, 2400, 4800], help="heights of the photograph"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    photo = photograph()
    print(f"Decoding and shrinking to {PIXELS:,} pixels. {environment('cpu')}\n")
    decoding(photo, args.sides, args.repeats)
    print("\nEncoding.\n")
    encoding(
        photo.resize((2048 * 3 // 7, 2400 * 3 // 7), Image.Resampling.LANCZOS), args.repeats, crem.load(args.model)
    )


def photograph() -> Image.Image:
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB")


def decoders() -> dict[str, Decoder]:
    """RGB of at most ``PIXELS`` from a JPEG; the first is the oracle."""
    found: dict[str, Decoder] = {
        "Pillow": lambda data: _shrunk(decode_image(data, LIMITS).image),
        "Pillow, torch's resize": lambda data: _shrunk_by_torch(decode_image(data, LIMITS).image),
    }
    if (simplejpeg := _installed("simplejpeg")) is not None:

        def turbo(data: bytes) -> np.ndarray:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            scale = (PIXELS / (width * height)) ** 0.5
            least = (int(height * scale * 2), int(width * scale * 2)) if scale < 0.5 else (0, 0)
            pixels = simplejpeg.decode_jpeg(
                data, min_height=least[0], min_width=least[1], fastdct=False, fastupsample=False
            )
            return _shrunk(Image.fromarray(pixels))

        found["libjpeg-turbo (simplejpeg)"] = turbo
    if (pyvips := _installed("pyvips")) is not None:

        def vips(data: bytes) -> np.ndarray:
            header = pyvips.Image.new_from_buffer(data, "")
            scale = min(1.0, (PIXELS / (header.width * header.height)) ** 0.5)
            width, height = int(header.width * scale), int(header.height * scale)
            if scale == 1:
                return np.asarray(header.numpy())
            return np.asarray(pyvips.Image.thumbnail_buffer(data, width, height=height, size="force").numpy())

        found["libvips (pyvips)"] = vips
    return found


def decoding(photo: Image.Image, sides: list[int], repeats: int) -> None:
    rows = []
    for side in sides:
        size = (side * photo.width // photo.height, side)
        file = io.BytesIO()
        photo.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
        data = file.getvalue()
        each = decoders()
        seconds = interleaved({name: _run(decode, data) for name, decode in each.items()}, repeats)
        oracle = each["Pillow"](data).astype(int)
        for name, decode in each.items():
            difference = np.abs(decode(data).astype(int) - oracle)
            rows.append(
                [
                    f"{size[0]} x {size[1]}",
                    name,
                    f"{1000 * seconds[name]:.1f}",
                    f"{seconds['Pillow'] / seconds[name]:.2f}",
                    f"{difference.mean():.2f}",
                    difference.max(),
                ]
            )
    table(["JPEG", "decoder", "ms", "Pillow / this", "mean difference", "largest"], rows)


def encoding(picture: Image.Image, repeats: int, model: crem.Crem) -> None:
    def run(kind: ImageKind, quality: int) -> Callable[[], object]:
        return lambda: encode_image(picture, PIXELS, kind=kind, quality=quality)

    seconds = interleaved({n: (lambda e=e: run(*e)) for n, e in ENCODINGS.items()}, repeats)
    stored = {n: encode_image(picture, PIXELS, kind=k, quality=q)[0] for n, (k, q) in ENCODINGS.items()}
    opened = {n: interleaved({n: _run(_decoded, data)}, repeats)[n] for n, data in stored.items()}
    exact = np.asarray(picture).astype(float)
    plain = embeddings(model, picture)
    rows = []
    for name, data in stored.items():
        error = float(((_decoded(data).astype(float) - exact) ** 2).mean())
        cosines = (embeddings(model, Image.fromarray(_decoded(data))) * plain).sum(axis=1)
        rows.append(
            [
                name,
                f"{len(data) / 1024:.0f}",
                f"{len(data) / len(stored['auto (JPEG 95)']):.2f}",
                f"{1000 * seconds[name]:.0f}",
                f"{seconds[name] / seconds['auto (JPEG 95)']:.2f}",
                f"{1000 * opened[name]:.0f}",
                "∞" if error == 0 else f"{10 * np.log10(255**2 / error):.1f}",
                f"{1 - cosines.min():.1e}",
            ]
        )
    table(["stored as", "KiB", "ratio", "encode ms", "ratio", "decode ms", "PSNR dB", "1 − cosine"], rows)


def embeddings(model: crem.Crem, picture: Image.Image) -> np.ndarray:
    """[12, D] of a grid of crops, at the size that the model reads."""
    width, height = picture.width // 3, picture.height // 4
    crops = [
        picture.crop((x * width, y * height, (x + 1) * width, (y + 1) * height)) for y in range(4) for x in range(3)
    ]
    return np.asarray(model.embed(crops))


def _run(decode: Decoder, data: bytes) -> Callable[[], Callable[[], object]]:
    return lambda: lambda: decode(data)


def _decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, LIMITS).image)


def _shrunk(image: Image.Image) -> np.ndarray:
    scale = min(1.0, (PIXELS / (image.width * image.height)) ** 0.5)
    if scale < 1:
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _shrunk_by_torch(image: Image.Image) -> np.ndarray:
    scale = min(1.0, (PIXELS / (image.width * image.height)) ** 0.5)
    if scale == 1:
        return np.asarray(image)
    pixels_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    size = [int(image.height * scale), int(image.width * scale)]
    shrunk = torch.nn.functional.interpolate(pixels_CHW, size=size, mode="bicubic", antialias=True)
    return shrunk[0].permute(1, 2, 0).contiguous().numpy()


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


if __name__ == "__main__":
    main()
