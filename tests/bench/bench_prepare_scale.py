"""``crem prepare`` and ``crem verify`` of many rows: time and memory of the driver, the workers and the object store.

    python -m tests.bench.bench_prepare_scale --rows 10000 100000 1000000
    python -m tests.bench.bench_prepare_scale --staged 1000000 4000000 16000000
    python -m tests.bench.bench_prepare_scale --tasks 1000 4000 16000

``--rows`` prepares and verifies a corpus of texts whole. ``--staged`` writes what staging would leave of so many rows
(texts of 30 characters, 1 % repeated ids, a small picture to 256 rows) and runs what follows: repeated ids, decisions
and their shuffles, cut, parts, publication and ``verify``; duplicates only with ``--duplicates``. ``--tasks`` runs
empty tasks through ``ray_tasks.stream``, which all steps use: what the driver keeps of each.

Memory is what a process does not share (resident less shared pages), and the most of any at a time. Of the object store
it is what it holds, whether by the pages of a process or spilled.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from crem.config import RunConfig, load_config
from pipelines.corpus.commit import commit
from pipelines.corpus.ledger import PieceLedger, staged_file
from pipelines.corpus.prepare import prepare
from pipelines.corpus.publish import manifest_of, publish
from pipelines.corpus.resolve import resolve
from pipelines.corpus.verify import verify
from pipelines.corpus.work_plan import WorkPlan
from pipelines.tables import ray_tasks, schema
from pipelines.tables.part_reads import in_threads
from pipelines.tables.storage import Folder, JobKind
from tests.bench.process_memory import Peaks
from tests.bench.sampling import sampled
from tests.bench.timing import table

_PIECE_ROWS = 4096
_FILE_ROWS = 200_000
_STEPS = ("resolve", "commit", "publish", "verify")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[])
    parser.add_argument("--staged", type=int, nargs="+", default=[])
    parser.add_argument("--tasks", type=int, nargs="+", default=[])
    parser.add_argument("--duplicates", choices=("off", "report"), default="off")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    logging.disable(logging.INFO)
    folder = Path(tempfile.mkdtemp(prefix="crem-bench-"))
    config = load_config("micro", [f'prepare.exact_duplicates="{args.duplicates}"'])
    ray.init(
        address="local",
        num_cpus=args.workers,
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        list(ray_tasks.stream(abs, range(4)))  # the first execution starts Ray Data's actors
        for runs, sizes in ((whole, args.rows), (staged, args.staged), (tasks, args.tasks)):
            found: list[list[str]] = []
            for size in sizes:
                found += runs(folder / f"{runs.__name__}-{size}", size, config)
                shutil.rmtree(folder, ignore_errors=True)
            if found:
                print(f"\n{runs.__name__}\n")
                table(["rows", "step", "s", "µs/row", "driver MB", "worker MB", "workers MB", "objects MB"], found)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def whole(folder: Path, rows: int, config: RunConfig) -> list[list[str]]:
    """All steps of a corpus of texts."""
    _write_texts(folder / "corpus", rows)
    out = str(folder / "out")
    return [
        _measured(rows, "prepare", lambda: prepare(str(folder / "corpus"), out, config)),
        _measured(rows, "verify", lambda: _verified(out)),
    ]


def staged(folder: Path, rows: int, config: RunConfig) -> list[list[str]]:
    """The steps after staging."""
    out = Folder.at(folder / "out")
    out.claim(JobKind.PREPARE)
    work = out.child("_work").child("bench")
    plan = _write_staged(work, rows)
    found: dict[str, Any] = {}

    def committed() -> None:
        found["tables"] = commit(plan, out=out, work=work, version="bench", after_each=lambda: None)

    def published() -> None:
        tables = found["tables"]
        known = {"layouts": [], "source_uri": "bench", "config": {}, "unknown_columns": {}}
        manifest = manifest_of(
            tables.statistics,
            plan="bench",
            version="bench",
            records_in=rows,
            rows_in=tables.rows_in,
            parts=tables.parts,
            **known,  # type: ignore[arg-type]
        )
        publish(out, manifest, tables.statistics, tables.parts)
        out.remove("_work")

    steps = (lambda: resolve(work, plan, config.prepare), committed, published, lambda: _verified(out.uri))
    return [_measured(rows, name, step) for name, step in zip(_STEPS, steps, strict=True)]


def tasks(folder: Path, count: int, config: RunConfig) -> list[list[str]]:
    """Empty tasks."""
    return [_measured(count, "stream", lambda: sum(1 for _ in ray_tasks.stream(abs, range(count))))]


def _verified(out: str) -> None:
    faults = verify(out).faults
    assert not faults, faults[:3]


def _measured(rows: int, step: str, run: Callable[[], object]) -> list[str]:
    start = time.perf_counter()
    peaks = Peaks()
    with sampled(peaks.sample):
        run()
    seconds = time.perf_counter() - start
    found = [f"{rows:,}", step, f"{seconds:.1f}", f"{seconds / rows * 1e6:.1f}", *(f"{mb:.0f}" for mb in peaks.mb)]
    print(" ".join(found), flush=True)
    return found


def _write_texts(folder: Path, rows: int) -> None:
    (folder / "rows").mkdir(parents=True)
    for start in range(0, rows, _FILE_ROWS):
        numbers = np.arange(start, min(rows, start + _FILE_ROWS)).astype("U")
        columns = {
            "key": numbers,
            "query_text": np.char.add("a question ", numbers),
            "target_text": np.char.add("t", numbers),
        }
        pq.write_table(pa.table(columns), folder / "rows" / f"{start:010d}.parquet", row_group_size=20_000)


def _write_staged(work: Folder, rows: int) -> WorkPlan:
    """Ledgers and staged files of so many rows."""
    pieces = -(-rows // _PIECE_ROWS)
    text = pa.array([f"a question of thirty letters {i}" for i in range(_PIECE_ROWS)])
    per_image = 256
    images = _PIECE_ROWS // per_image

    def write(piece: int) -> None:
        random = np.random.default_rng(piece)
        size = min(_PIECE_ROWS, rows - piece * _PIECE_ROWS)
        ids = random.integers(-(2**63), 2**63 - 1, _PIECE_ROWS)
        repeated = random.random(_PIECE_ROWS) < 0.01
        ids[repeated] = random.integers(0, rows, int(repeated.sum()))
        ids = ids[:size]
        pictures = [b"a picture %d %d" % (piece % 500, number) * 9 for number in range(images)]
        image_ids = np.array([schema.content_id(data) for data in pictures], np.int64)
        places = np.repeat(np.arange(images), per_image)[:size]
        named = pa.ListArray.from_arrays(np.arange(size + 1, dtype=np.int32), pa.array(image_ids[places]))
        nothing = pa.ListArray.from_arrays(np.zeros(size + 1, np.int32), pa.array([], pa.int32()))
        words, none = text.slice(0, size), pa.nulls(size, pa.string())
        item = pa.StructArray.from_arrays([words, none, named, nothing], fields=list(schema.ITEM))
        constant = {name: pa.array([name] * size) for name in ("source", "task")}
        keys = pa.array(ids).cast(pa.string())
        negatives = pa.ListArray.from_arrays(np.zeros(size + 1, np.int32), pa.array([], schema.ITEM))
        split = pa.array(["train"] * size)
        columns = [pa.array(ids), constant["source"], keys, constant["task"], split, item, item, negatives, none, none]
        staged_rows = pa.table(columns, schema=schema.ROWS)
        staged_images = pa.table(
            [image_ids, pa.array(pictures), [8] * images, [8] * images, [""] * images], schema=schema.IMAGES
        )
        row_bytes = _write_ipc(work, staged_file("rows", piece, "a", 0), staged_rows)
        _write_ipc(work, staged_file("images", piece, "a", 0), staged_images)
        zeros = np.zeros(images, np.int64)
        PieceLedger(
            piece=piece, attempt="a", records=size, rows_in=size, rejected=0, row_ids=ids, image_ids=image_ids,
            image_bytes=np.array([len(data) for data in pictures]), shrunk_from=zeros, ref_rows=np.arange(size),
            ref_images=image_ids[places], row_files=np.array([size]), row_bytes=row_bytes,
            image_files=np.array([images]), rejected_files=np.empty(0, np.int64), unknown_columns="{}", truncated=zeros,
        ).write(work)  # fmt: skip

    in_threads(write, range(pieces))
    return WorkPlan(records=rows, chunks=(pieces,))


def _write_ipc(work: Folder, name: str, content: pa.Table) -> int:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, content.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(content)
    data = sink.getvalue()
    work.write_bytes(data.to_pybytes(), name)
    return int(data.size)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
