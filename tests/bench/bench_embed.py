"""``crem embed`` against the bare model on the same items, and against batches of 32 in the order in which they come.

    python -m tests.bench.bench_embed [--texts 1000] [--images 100] [--repeats 3] [--compile]
    python -m tests.bench.bench_embed --forwards    # the model alone, in several forms of batches

Texts of 3 to 300 words, and images of four sizes; a random model of micro's shape that reads 1,024 tokens of a text, or
``--model``. Ray is started before, and the job has one actor. Its time without the start of its workers comes from its
own progress: rows over the seconds between its first and its last window. All ways use one torch thread on a CPU; with
``--gpus 1`` model and actor are on a GPU.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image

import crem
from crem.checkpoint import save_model
from crem.config import load_config
from crem.data.sequence import PreparedSequence
from crem.model.backbone import compile_layers
from pipelines.embedding import embed_run
from pipelines.embedding.embed import embed
from pipelines.embedding.window_embedder import WindowCounts
from pipelines.tables import ray_tasks
from tests.bench.steps import build
from tests.bench.timing import interleaved, table

SIZES = ((64, 64), (128, 96), (96, 160), (224, 224))
PLAIN_BATCH = 32


def items(texts: int, images: int) -> list[dict[str, Any]]:
    """Rows in random order."""
    draw = np.random.default_rng(0)
    words = ["apple", "harbour", "evening", "of", "the", "red", "boat", "under", "light", "stone"]
    rows: list[dict[str, Any]] = [
        {"text": " ".join(draw.choice(words, int(draw.integers(3, 301)))), "bytes": None} for _ in range(texts)
    ]
    for number in range(images):
        picture = Image.fromarray(draw.integers(0, 255, (6, 8, 3), np.uint8))
        sink = io.BytesIO()
        picture.resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC).save(sink, "JPEG")
        rows.append({"text": None, "bytes": sink.getvalue()})
    draw.shuffle(rows)  # type: ignore[arg-type]
    return [{"id": number, **row} for number, row in enumerate(rows)]


def run_job(source: Path, out: Path, model: str, gpus: int) -> tuple[float, float]:
    """Seconds of the whole job, and of it between its first and its last window, for all rows."""
    seen: list[tuple[float, int]] = []
    staged = embed_run.EmbedRun._staged

    def timed(run: embed_run.EmbedRun, counts: WindowCounts) -> None:
        seen.append((time.perf_counter(), counts.rows))
        staged(run, counts)

    embed_run.EmbedRun._staged = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    made = embed(
        model, str(source), str(out), load_config("micro", ["embed.max_actors=1", f"embed.gpus_per_actor={gpus}"])
    )
    whole = time.perf_counter() - began
    embed_run.EmbedRun._staged = staged  # type: ignore[method-assign]
    rows = sum(count for _, count in seen[1:])
    return whole, (seen[-1][0] - seen[0][0]) * made.rows_out / rows


def bare(model: crem.Crem, sequences: list[PreparedSequence]) -> float:
    """Items that are prepared and in memory, in windows of 4,096 as the job has them."""
    began = time.perf_counter()
    for at in range(0, len(sequences), 4096):
        model.embed_prepared(sequences[at : at + 4096])
    return time.perf_counter() - began


def plain(model: crem.Crem, sequences: list[PreparedSequence]) -> float:
    """The same, 32 at a time in the order in which they come, padded to the longest."""
    began = time.perf_counter()
    for at in range(0, len(sequences), PLAIN_BATCH):
        model.embed_prepared(sequences[at : at + PLAIN_BATCH], batch_size=PLAIN_BATCH, batch_tokens=sys.maxsize)
    return time.perf_counter() - began


def forwards(model: crem.Crem, sequences: list[PreparedSequence], repeats: int) -> None:
    """The model alone: batches of 32 in the order in which items come, and sorted ones of so many tokens."""
    sorted_of = {
        f"sorted, up to {tokens:,} tokens": partial(model.embed_prepared, sequences, batch_tokens=tokens)
        for tokens in (16_384, 4_096, 2_048)
    }
    ways = {"batches of 32": partial(plain, model, sequences), **sorted_of}
    found = interleaved({name: lambda run=run: run for name, run in ways.items()}, repeats, str(model.device))
    lines = [
        [name, f"{s:.1f}", f"{len(sequences) / s:.0f}", f"{found['batches of 32'] / s:.2f}"]
        for name, s in found.items()
    ]
    table(["", "s", "items/s", "times as fast"], lines)


def _random_model(width: int, place: Path) -> Path:
    model, collator, _ = build(width, 224, "cpu")
    save_model(model.eval(), collator, place)
    return place


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="a checkpoint; by default a random one of micro's shape")
    parser.add_argument("--width", type=int, default=128, help="of the random one")
    parser.add_argument("--gpus", type=int, choices=[0, 1], default=0)
    parser.add_argument("--compile", action="store_true", help="measure compiled layers too")
    parser.add_argument("--forwards", action="store_true", help="the model alone, and no job")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    rows = items(args.texts, args.images)
    folder = tempfile.TemporaryDirectory(prefix="crem-bench-")
    place = str(Path(args.model or _random_model(args.width, Path(folder.name) / "model")).resolve())
    model = crem.load(place, device="cuda" if args.gpus else "cpu")
    sequences = [
        model.prepare(crem.Item(text=row["text"], images=[row["bytes"]] if row["bytes"] else [])) for row in rows
    ]
    if args.forwards:
        forwards(model, sequences, args.repeats)
        return
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    list(ray_tasks.stream(abs, range(4)))  # the first execution starts Ray Data's actors
    times: dict[str, list[float]] = {"job": [], "job, start apart": [], "bare model": [], "batches of 32": []}
    compiled = crem.load(place, device=model.device) if args.compile else None
    if compiled is not None:
        compile_layers(compiled.model.core)
        bare(compiled, sequences)  # compiles
        times["compiled layers"] = []
    with folder:
        source = Path(folder.name) / "items.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
        for repeat in range(args.repeats):
            whole, steady = run_job(source, Path(folder.name) / f"out-{repeat}", place, args.gpus)
            times["job"].append(whole)
            times["job, start apart"].append(steady)
            times["bare model"].append(bare(model, sequences))
            times["batches of 32"].append(plain(model, sequences))
            if compiled is not None:
                times["compiled layers"].append(bare(compiled, sequences))
    ray.shutdown()
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    lines = [
        [name, f"{s:.1f}", f"{len(rows) / s:.0f}", f"{s / medians['bare model']:.2f}"] for name, s in medians.items()
    ]
    table(["", "s", "items/s", "time / bare model's"], lines)


if __name__ == "__main__":
    main()
