"""The parts of ``crem embed`` that see a whole corpus, on a billion rows: plan, ledgers, comparison of two inputs.

    python -m tests.bench.bench_embed_plan --files 100000 --file-rows 10000 --folder /scratch

Real code on synthetic rows: Parquet files whose one column is a constant (a kilobyte for 10,000 rows), and ledgers as
the commit of each shard writes them. No vector is written. "listing" to "input files" is what a run does before its
first item; "listing", "identity" and "ledgers read" what it does where all is done, and the last also what it reads to
make the manifest. The count of repeated ids, which reads the ids of all parts, is not among them.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipelines.corpus.work_plan import WorkPlan, identity_of, plan_by_tasks
from pipelines.embedding.grow import gone_ranges
from pipelines.embedding.input_files import compare, read_input_files, write_input_files
from pipelines.embedding.output import ShardLedger, create_ledger, parts_of, read_ledgers
from pipelines.sources import sources
from pipelines.tables import ray_tasks
from pipelines.tables.manifest import PartFile
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder
from tests.bench.process_memory import Peaks
from tests.bench.sampling import sampled
from tests.bench.timing import table

_PART_ROWS = 43_690
"""Of a part of 256 MB at 1,536 dimensions."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--file-rows", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", help="for input and output; temporary by default")
    args = parser.parse_args(argv)
    logging.disable(logging.INFO)
    ray.init(
        address="local",
        num_cpus=args.workers,
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    list(ray_tasks.stream(abs, range(4)))  # the first execution starts Ray Data's actors
    with tempfile.TemporaryDirectory(prefix="crem-bench-", dir=args.folder) as folder:
        table(["step", "s", "driver MB"], steps(Path(folder), args.files, args.file_rows))
    ray.shutdown()


def steps(folder: Path, files: int, file_rows: int) -> list[list[str]]:
    """Time and memory of each step."""
    write_files(folder / "items", files, file_rows)
    out, work = Folder.at(folder / "out"), Folder.at(folder / "out" / "_work")
    found: list[list[str]] = []

    def step(name: str, run: Callable[[], Any]) -> Any:
        began, peaks = time.perf_counter(), Peaks()
        peaks.sample()
        with sampled(peaks.sample):
            value = run()
        found.append([name, f"{time.perf_counter() - began:.1f}", f"{peaks.mb[0]:.0f}"])
        print(*found[-1], flush=True)
        return value

    source = step("listing", lambda: sources.find(str(folder / "items")))
    step("identity", lambda: identity_of(source, []))
    plan: WorkPlan = step("plan", lambda: plan_by_tasks(source, None, None, work))
    assert plan.records == files * file_rows, plan.records
    step("input files", lambda: write_input_files(out, source, work, plan))
    step(f"{plan.groups} ledgers written", lambda: write_ledgers(out, plan))
    ledgers = step("resume: ledgers read", lambda: read_ledgers(out))
    assert sum(ledger.rows for ledger in ledgers) == plan.records
    parts = parts_of(ledgers)

    def grown() -> None:
        present = read_input_files(out)
        assert present is not None
        kept = np.arange(len(source)) % 10 != 0
        difference = compare(present, source.table.filter(pa.array(kept)))
        gone = difference.gone
        rows = np.array([part.rows for part in parts], np.int64)
        ranges = gone_ranges(rows, gone["first"].to_numpy(), gone["rows"].to_numpy())
        assert int(ranges[2].sum()) == int((~kept).sum()) * file_rows

    step("growth: a tenth of the files gone, as ranges of parts", grown)
    return found


def write_files(folder: Path, files: int, file_rows: int) -> None:
    """Parquet files of so many rows; the bytes of all are those of the first."""
    folder.mkdir(parents=True)
    first = folder / f"{0:09d}.parquet"
    pq.write_table(pa.table({"text": pa.array(["a"] * file_rows)}), first)
    data = first.read_bytes()
    for number in range(1, files):
        (folder / f"{number:09d}.parquet").write_bytes(data)


def write_ledgers(out: Folder, plan: WorkPlan) -> None:
    """Of all shards, with the parts that they would have."""
    bounds = np.linspace(0, plan.records, plan.groups + 1).astype(int)

    def write(shard: int) -> None:
        rows = int(bounds[shard + 1] - bounds[shard])
        starts = range(0, rows, _PART_ROWS)
        parts = tuple(
            PartFile(
                table="embeddings",
                name=f"rows/part-{shard:06d}-{number:04d}-00000000.parquet",
                rows=min(_PART_ROWS, rows - start),
                bytes=256 * 2**20,
                checksum="0" * 32,
            )
            for number, start in enumerate(starts)
        )
        pieces = plan.group(shard)
        create_ledger(
            out,
            ShardLedger(
                shard=shard, first_piece=pieces.start, pieces=len(pieces), rows=rows, embedded=rows, failed={}, cut=0,
                longest_text=1, tokens=rows, device_s=1.0, unknown={}, fingerprint="f", parts=parts, committed="",
            ),
        )  # fmt: skip

    in_threads(write, range(plan.groups))


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
