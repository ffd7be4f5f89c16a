"""A local Ray for the jobs, and a corpus in which most things that go wrong in the field go wrong."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """One small Ray for the tests of this folder."""
    ray.init(address="local", num_cpus=4, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def random_image(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """An image of random blocks, different for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header declares ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def image_files() -> dict[str, bytes]:
    """Files of ``images/``; those of ``good_`` can be read."""
    palette = random_image(3).quantize(8)
    alpha = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    frames = [random_image(10 + i) for i in range(3)]
    return {
        "good_a.png": encoded(random_image(1)),
        "good_b.jpg": encoded(random_image(2, (64, 48)), "JPEG"),
        "good_copy_of_a.png": encoded(random_image(1)),
        "good_cmyk.jpg": encoded(random_image(4, mode="CMYK"), "JPEG"),
        "good_palette_alpha.png": encoded(palette, transparency=0),
        "good_clear.png": encoded(alpha),
        "good_moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "good_1x1.png": encoded(Image.new("RGB", (1, 1), (9, 8, 7))),
        "good_ünïcode 漢字.png": encoded(random_image(5)),
        "bad_header.png": b"\x89PNG\r\n\x1a\n" + b"garbage" * 9,
        "bad_empty.png": b"",
        "bad_truncated.jpg": encoded(random_image(6, (64, 64)), "JPEG", quality=95)[:400],
        "bad_text.png": b"<html>404</html>",
        "bomb.png": bomb(),
        "small_bomb.png": bomb(12_000),  # over our bound, and under the one at which Pillow itself refuses
    }


JSON_ROWS: list[tuple[str, dict[str, Any] | str, str]] = [
    # (key, row or literal line, expected reason; "" is accepted)
    ("pair", {"query_text": "a", "target_images": ["good_a.png"]}, ""),
    ("jpeg", {"query_text": "b", "target_images": ["good_b.jpg"], "split": "test_x", "task": "t2i"}, ""),
    ("copy", {"query_images": ["good_copy_of_a.png"], "target_text": "the same pixels as good_a"}, ""),
    ("cmyk", {"query_images": ["good_cmyk.jpg"], "target_text": "four inks"}, ""),
    ("palette", {"query_images": ["good_palette_alpha.png"], "target_text": "palette"}, ""),
    ("clear", {"query_images": ["good_clear.png"], "target_text": "see-through"}, ""),
    ("moving", {"query_images": ["good_moving.gif"], "target_text": "frames"}, ""),
    ("dot", {"query_images": ["good_1x1.png"], "target_text": "a dot"}, ""),
    ("ключ 鍵", {"query_images": ["good_ünïcode 漢字.png"], "target_text": "🍎 é́ \u202eרtl"}, ""),
    ("three", {"query_images": ["good_a.png", "good_b.jpg", "good_a.png"], "question": "how many?", "answer": 3}, ""),
    ("numbers", {"query_text": 5, "target_text": 2.5}, ""),
    ("negatives", {"query_text": "q", "target_text": "t", "negatives": [{"text": "n"}, {"text": " "}]}, ""),
    ("blank target", {"query_text": "q", "target_text": "", "question": "what?", "answer": "that"}, ""),
    ("header", {"query_text": "q", "target_images": ["bad_header.png"]}, "image_corrupt"),
    ("zero", {"query_text": "q", "target_images": ["bad_empty.png"]}, "image_corrupt"),
    ("truncated", {"query_text": "q", "target_images": ["bad_truncated.jpg"]}, "image_corrupt"),
    ("html", {"query_text": "q", "target_images": ["bad_text.png"]}, "image_corrupt"),
    ("bad after good", {"query_images": ["good_1x1.png", "bad_text.png"], "target_text": "t"}, "image_corrupt"),
    ("bomb", {"query_text": "q", "target_images": ["bomb.png"]}, "image_too_large"),
    ("small bomb", {"query_text": "q", "target_images": ["small_bomb.png"]}, "image_too_large"),
    ("missing", {"query_text": "q", "target_images": ["nowhere.png"]}, "image_missing"),
    ("http", {"query_text": "q", "target_images": ["https://example.invalid/a.png"]}, "uri_refused"),
    ("scheme", {"query_text": "q", "target_images": ["nosuch://x/a.png"]}, "uri_refused"),
    ("folder", {"query_text": "q", "target_images": ["/"]}, "uri_refused"),
    ("negative", {"query_text": "q", "target_text": "t", "negatives": [{"images": ["gone.png"]}]}, "image_missing"),
    ("nothing", {}, "empty_item"),
    ("no query", {"query_text": " \t\n", "target_text": "t"}, "empty_query"),
    ("no target", {"query_text": "q"}, "empty_target"),
    ("no answer", {"query_text": "q", "target_text": "t", "question": "what?"}, "missing_answer"),
    ("no question", {"query_text": "q", "target_text": "t", "answer": "that"}, "missing_question"),
    ("long", {"query_text": "x" * 201, "target_text": "t"}, "text_too_long"),
    ("many", {"query_images": ["good_a.png"] * 5, "target_text": "t"}, "too_many_images"),
    ("pair", {"query_text": "again", "target_text": "the key of the first row"}, "duplicate_id"),
    ("list", {"query_text": ["q"], "target_text": "t"}, "bad_row"),
    ("bool", {"query_text": True, "target_text": "t"}, "bad_row"),
    ("image number", {"query_images": [7], "target_text": "t"}, "bad_row"),
    ("negatives text", {"query_text": "q", "target_text": "t", "negatives": "n"}, "bad_row"),
    ("surrogate", {"query_text": "\ud800", "target_text": "t"}, "bad_row"),
    ("a.jsonl#38", '{"query_text": "q", "target_text": ', "bad_row"),
    ("a.jsonl#39", "[1, 2]", "bad_row"),
    ("a.jsonl#40", '{"query_text": "\x81"}', "bad_row"),
    ("after the bad lines", {"query_text": "q", "target_text": "t"}, ""),
]
"""Rows of one JSONL file under limits of 200 characters and 4 images."""

STORED_IMAGES = 8
"""Distinct images of the accepted rows: nine good files, one of them a copy."""


def write_nasty_corpus(folder: Path) -> Path:
    """``JSON_ROWS`` as ``rows/a.jsonl``, with its images."""
    (folder / "images").mkdir(parents=True)
    (folder / "rows").mkdir()
    for name, data in image_files().items():
        (folder / "images" / name).write_bytes(data)
    lines = [
        row.encode("latin-1") if isinstance(row, str) else json.dumps({"key": key, **row}).encode()
        for key, row, _ in JSON_ROWS
    ]
    (folder / "rows" / "a.jsonl").write_bytes(b"\n\n".join(lines))  # blank lines between, none at the end
    (folder / "LICENSES.md").write_text("none")
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def table(folder: Path | str) -> list[dict[str, Any]]:
    """All rows of a folder of Parquet files, or of the folder ``rows`` in it."""
    files = sorted(Path(folder).glob("*.parquet")) or sorted(Path(folder).glob("rows/*.parquet"))
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


def part_of(folder: Path, shard: int) -> Path:
    """The only part of a shard of vectors."""
    (part,) = folder.glob(f"rows/part-{shard:06d}-0000-*.parquet")
    return part
