"""``crem prepare`` against a bare process pool and ``datasets.map`` that do the same work; memory; cost of a row.

    python -m tests.bench.bench_prepare [--images 1000] [--repeats 3] [--workers 2]
    python -m tests.bench.bench_prepare --rows 1000 10000 100000
    python -m tests.bench.bench_prepare --memory 1 4 16

The work is to decode a JPEG photo, resize it to the limit and encode it. The photos are noise over gradients, of which
each is different. The pool writes nothing but the bytes; ``datasets`` (if it is installed) writes its Arrow cache.
Variants are interleaved. Ray has been started before the clock runs: a start costs the same for any corpus.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from PIL import Image

from crem.config import load_config
from crem.data.images import decode_image, encode_image
from pipelines.corpus.prepare import prepare
from tests.bench.sampling import sampled
from tests.bench.timing import table

LIMITS = load_config("micro", []).model.image
MAX_PIXELS = 512 * 512
_SIDES = ((1024, 768), (800, 1200), (640, 480), (1280, 960))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[])
    parser.add_argument("--memory", type=int, nargs="+", default=[])
    args = parser.parse_args(argv)
    logging.disable(logging.INFO)
    folder = Path(tempfile.mkdtemp(prefix="crem-bench-"))
    try:
        ray.init(
            address="local", num_cpus=args.workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
        if args.rows:
            rows_table(folder, args.rows, args.repeats)
        elif args.memory:
            memory_table(folder, args.images, args.memory)
        else:
            speed_table(folder, args.images, args.repeats, args.workers)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def speed_table(folder: Path, images: int, repeats: int, workers: int) -> None:
    """Seconds of each variant, and the ratio to ``prepare``."""
    corpus = write_photos(folder / "photos", images)
    write_photos(folder / "few", 64)
    prepare_once(folder / "few", folder)  # Ray Data's first execution starts its actors
    paths = sorted(str(path) for path in (corpus / "images").iterdir())
    variants: dict[str, Callable[[], None]] = {
        "prepare": lambda: prepare_once(corpus, folder),
        "process pool": lambda: pool(paths, workers),
    }
    if importlib.util.find_spec("datasets"):
        variants["datasets.map, our functions"] = lambda: datasets_map(paths, workers, folder)
        variants["datasets.map, its Image feature"] = lambda: datasets_images(paths, workers, folder)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"\n{images} photos, {workers} workers, medians of {repeats} interleaved rounds\n")
    rows = [[n, f"{s:.1f}", f"{images / s:.0f}", f"{s / medians['prepare']:.2f}"] for n, s in medians.items()]
    table(["", "s", "images/s", "time / prepare's"], rows)


def rows_table(folder: Path, sizes: list[int], repeats: int) -> None:
    """Cost of a row of text over the size of the corpus."""
    write_texts(folder / "few", 200)
    prepare_once(folder / "few", folder)
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for size in sizes:
        write_texts(folder / f"texts-{size}", size)
    for _ in range(repeats):
        for size in sizes:
            start = time.perf_counter()
            prepare_once(folder / f"texts-{size}", folder)
            found[size].append(time.perf_counter() - start)
    medians = [statistics.median(found[size]) for size in sizes]
    start_up = medians[0]
    rows = []
    for size, seconds in zip(sizes, medians, strict=True):
        marginal = (seconds - start_up) / (size - sizes[0]) * 1e6 if size > sizes[0] else float("nan")
        rows.append([f"{size:,}", f"{seconds:.2f}", f"{seconds / size * 1e6:.0f}", f"{marginal:.0f}"])
    print("\n")
    table(["rows", "s", "µs/row", "µs/row beyond the smallest"], rows)


def memory_table(folder: Path, images: int, factors: list[int]) -> None:
    """The most that any process held, over the size of the corpus."""
    rows = []
    for factor in factors:
        corpus = write_photos(folder / f"photos-{factor}", images * factor)
        gc.collect()
        peaks = _Peaks()
        with sampled(peaks.sample):
            prepare_once(corpus, folder)
        rows.append([f"{factor}x", f"{images * factor:,}", *(f"{peaks.mb[k]:.0f}" for k in ("driver", "worker"))])
        shutil.rmtree(corpus)
    print("\nlargest resident memory of a process, MB (shared pages counted)\n")
    table(["corpus", "photos", "driver", "worker"], rows)


class _Peaks:
    """The most resident memory of this process, and of any of Ray's workers, in MB."""

    def __init__(self) -> None:
        self.mb = {"driver": 0.0, "worker": 0.0}

    def sample(self) -> None:
        me = psutil.Process()
        self.mb["driver"] = max(self.mb["driver"], me.memory_info().rss / 1e6)
        for child in me.children(recursive=True):
            try:
                if "ray::Map" in " ".join(child.cmdline()):
                    self.mb["worker"] = max(self.mb["worker"], child.memory_info().rss / 1e6)
            except psutil.Error:
                continue


def prepare_once(corpus: Path, folder: Path) -> None:
    """Into an empty folder."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    prepare(str(corpus), str(out), load_config("micro", [f"prepare.encode_max_pixels={MAX_PIXELS}"]))


def encode_file(path: str) -> int:
    """The same work as a task of ``prepare``: bytes of the stored image."""
    with open(path, "rb") as file:
        decoded = decode_image(file.read(), LIMITS.model_copy(update={"max_pixels": MAX_PIXELS}))
    return len(encode_image(decoded.image, MAX_PIXELS)[0])


def pool(paths: list[str], workers: int) -> None:
    """A bare process pool."""
    with multiprocessing.get_context("spawn").Pool(workers) as processes:
        processes.map(encode_file, paths, chunksize=16)


def datasets_map(paths: list[str], workers: int, folder: Path) -> None:
    """Hugging Face ``datasets`` around our own functions; every run does the work anew."""
    import datasets

    _mapped(datasets.Dataset.from_dict({"path": paths}), encoded_row, workers, folder)


def datasets_images(paths: list[str], workers: int, folder: Path) -> None:
    """As the guide of ``datasets`` shrinks images: a column of its type ``Image``, which stores the results as PNG."""
    import datasets

    images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    _mapped(images, shrunk_row, workers, folder)


def _mapped(dataset: Any, function: Callable[[dict[str, Any]], dict[str, Any]], workers: int, folder: Path) -> None:
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    cache = folder / "datasets"
    cache.mkdir(exist_ok=True)
    dataset.map(function, num_proc=workers, cache_file_name=str(cache / "a.arrow"), load_from_cache_file=False)


def encoded_row(row: dict[str, Any]) -> dict[str, Any]:
    with open(row["path"], "rb") as file:
        decoded = decode_image(file.read(), LIMITS.model_copy(update={"max_pixels": MAX_PIXELS}))
    return {"bytes": encode_image(decoded.image, MAX_PIXELS)[0]}


def shrunk_row(row: dict[str, Any]) -> dict[str, Any]:
    image = row["image"].convert("RGB")
    scale = min(1.0, (MAX_PIXELS / (image.width * image.height)) ** 0.5)
    size = (int(image.width * scale), int(image.height * scale))
    return {"image": image.resize(size, Image.Resampling.BICUBIC)}


def write_photos(folder: Path, images: int) -> Path:
    """A corpus of photos, one row each."""
    (folder / "images").mkdir(parents=True)
    (folder / "rows").mkdir()
    random = np.random.default_rng(0)
    blocks = random.integers(0, 255, (8, 12, 3)).astype(np.uint8)
    bases = [np.asarray(Image.fromarray(blocks).resize(side, Image.Resampling.BICUBIC)) for side in _SIDES]
    lines = []
    for number in range(images):
        base = bases[number % len(bases)]
        noise = np.roll(base, number * 7, axis=1) ^ (random.integers(0, 8, base.shape[:2]).astype(np.uint8)[..., None])
        out = io.BytesIO()
        Image.fromarray(noise).save(out, "JPEG", quality=90)
        (folder / "images" / f"{number:06d}.jpg").write_bytes(out.getvalue())
        lines.append(json.dumps({"query_images": [f"{number:06d}.jpg"], "target_text": f"photo {number}"}))
    (folder / "rows" / "a.jsonl").write_text("\n".join(lines))
    return folder


def write_texts(folder: Path, rows: int) -> None:
    """A corpus of texts."""
    (folder / "rows").mkdir(parents=True)
    with (folder / "rows" / "a.jsonl").open("w") as file:
        for number in range(rows):
            file.write(json.dumps({"key": str(number), "query_text": f"a question {number} " * 4, "target_text": "t"}))
            file.write("\n")


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
