"""``crem embed`` of many rows without the cost of a model: time a row, and memory of the driver and the workers.

    python -m tests.bench.bench_embed_scale --rows 10000 100000 1000000 10000000 --folder /scratch --plot scale.svg

All of the job is real but the model (``null_model``): plan, reading, windows, staged files, commits, ledgers, repeated
ids, manifest; then ``crem verify``. With ``--tokenize`` the tokenizer is real too. Texts of six words in Parquet files
of 100,000 rows. A line of JSON for each size goes to ``--log``, from which ``--plot`` draws later. Memory is what a
process does not share, the most of any at a time; "steady" is from the first to the last window, without the start of
the workers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

import crem
from crem.checkpoint import read_collator
from crem.config import load_config
from pipelines.embedding import embed_run
from pipelines.embedding.embed import embed
from pipelines.embedding.verify_embeddings import verify_embeddings
from pipelines.embedding.window_embedder import WindowCounts
from pipelines.tables import ray_tasks
from tests.bench.null_model import NullCollator, load_null_model
from tests.bench.process_memory import Peaks
from tests.bench.sampling import sampled
from tests.bench.timing import table

MODEL = str(Path(crem.__file__).parent / "checkpoints" / "crem-micro")
_FILE_ROWS = 100_000


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--tokenize", action="store_true", help="with the model's own tokenizer")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="for input and output; temporary by default")
    parser.add_argument("--log", help="file of JSON lines to add to")
    parser.add_argument("--plot", help="SVG to draw of all lines of --log")
    args = parser.parse_args(argv)
    logging.disable(logging.INFO)
    log = Path(args.log) if args.log else None
    found = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    if args.rows:
        ray.init(
            address="local",
            num_cpus=args.workers,
            object_store_memory=1024 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        list(ray_tasks.stream(abs, range(4)))  # the first execution starts Ray Data's actors
        for rows in args.rows:
            with tempfile.TemporaryDirectory(prefix="crem-bench-", dir=args.folder) as folder:
                found.append(measured(Path(folder), rows, tokenize=args.tokenize))
            if log:
                log.write_text("".join(json.dumps(run) + "\n" for run in found))
        ray.shutdown()
    names = list(found[0])
    table(names, [[f"{run[name]:,}" for name in names] for run in found])
    if args.plot:
        Path(args.plot).write_text(plot(found))


def measured(folder: Path, rows: int, *, tokenize: bool) -> dict[str, Any]:
    """Embed and verify so many rows."""
    source, out = folder / "items", str(folder / "out")
    write_texts(source, rows)
    peaks = Peaks()
    loads: list[float] = []
    read: Any = read_collator if tokenize else NullCollator
    config = load_config("micro", ["embed.cpus_per_actor=0.5", "embed.max_actors=1"])
    windows: list[tuple[float, float, int]] = []
    began = time.perf_counter()
    with sampled(peaks.sample, 0.5), sampled(lambda: loads.append(os.getloadavg()[0]), 5), each_window(windows, peaks):
        made = embed(MODEL, str(source), out, config, load=load_null_model, read=read)
    seconds = time.perf_counter() - began
    assert (made.rows_in, made.embedded, made.repeated_ids) == (rows, rows, 0), made
    began = time.perf_counter()
    verified = verify_embeddings(out)
    assert not verified.faults and verified.rows == rows, verified
    driver, worker, workers, objects = peaks.mb
    return {
        "rows": rows,
        "s": round(seconds, 1),
        "µs/row": round(seconds / rows * 1e6, 1),
        "CPU s": round(peaks.cpu_s, 1),
        "steady µs/row": round(steady(windows, 0), 1),
        "steady CPU µs/row": round(steady(windows, 1), 1),
        "driver MB": round(driver),
        "worker MB": round(worker),
        "workers MB": round(workers),
        "objects MB": round(objects),
        "verify s": round(time.perf_counter() - began, 1),
        "shards": made.shards,
        "load": round(float(np.mean(loads or [0])), 1),
    }


@contextmanager
def each_window(windows: list[tuple[float, float, int]], peaks: Peaks) -> Iterator[None]:
    """Note time, processor time and rows as each window is staged, from which the cost without the start comes."""
    staged = embed_run.EmbedRun._staged

    def noted(run: embed_run.EmbedRun, counts: WindowCounts) -> None:
        windows.append((time.perf_counter(), peaks.cpu_s, counts.rows))
        staged(run, counts)

    embed_run.EmbedRun._staged = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        embed_run.EmbedRun._staged = staged  # type: ignore[method-assign]


def steady(windows: list[tuple[float, float, int]], clock: int) -> float:
    """µs a row between the first and the last window."""
    rows = sum(window[2] for window in windows[1:])
    return (windows[-1][clock] - windows[0][clock]) / rows * 1e6 if rows else float("nan")


def write_texts(folder: Path, rows: int) -> None:
    """Parquet files of short texts, all different."""
    folder.mkdir(parents=True)
    for start in range(0, rows, _FILE_ROWS):
        ids = np.arange(start, min(rows, start + _FILE_ROWS))
        text = np.char.add("a stone harbour in light ", ids.astype("U"))
        pq.write_table(pa.table({"id": ids, "text": text}), folder / f"{start:012d}.parquet", row_group_size=20_000)


def plot(runs: list[dict[str, Any]]) -> str:
    """Cost of a row and memory of the driver over the number of rows."""
    from pipelines.reports import charts

    runs = sorted(runs, key=lambda run: run["rows"])
    figure, (cost, memory) = charts.axes(2, 8.0, height=2.6)
    x = [run["rows"] for run in runs]
    charts.line(
        cost, list(zip(x, [run["steady CPU µs/row"] for run in runs], strict=True)), charts.BLUE, "processor time"
    )
    for axis, name, colour, label in (
        (cost, "steady CPU µs/row", charts.BLUE, "processor time"),
        (cost, "steady µs/row", charts.ORANGE, "time"),
        (memory, "driver MB", charts.BLUE, "driver"),
        (memory, "worker MB", charts.ORANGE, "largest worker"),
    ):
        charts.line(axis, list(zip(x, [run[name] for run in runs], strict=True)), colour, label)
    for axis, title in ((cost, "µs a row"), (memory, "MB")):
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("rows", fontsize=8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return str(charts.svg(figure))


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
