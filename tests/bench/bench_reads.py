"""How training reads single images: by their places in Parquet, by row groups of Parquet, by Lance, from Ray's objects.

    python -m tests.bench.bench_reads [--gb 1 4 16] [--s3] [--folder /tmp/bench-reads]

For each size it writes tables of random images of 60 to 100 kB and a row for each, once in every layout. Each way runs
in a process of its own, whose page cache of the files is dropped: the time until a first batch of 64 random rows is
there, then rows a second and the processor's time for windows of 512 random rows. Memory is the growth of the process;
``disk`` is what was written. ``objects`` is how training read before: all parts into Ray's object store.
``--index ROWS`` prints what the indexes of so many rows and images cost instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crem.config import load_config
from pipelines.tables import schema
from pipelines.tables.chosen_rows import content_of
from pipelines.tables.image_index import ImageIndex
from pipelines.tables.image_parts import PLACE, ImagePartWriter, image_places
from pipelines.tables.part_reads import in_threads, open_part
from pipelines.tables.row_index import Labels, RowIndex, index_of, scan_part
from pipelines.tables.storage import Folder
from tests.s3_server import S3Server

PART_BYTES = 256 * 2**20
GROUPS = {"80 kB": 1, "320 kB": 4, "1 MB": 13, "4 MB": 52}
"""Images of one row group."""
FIRST, WINDOW = 64, 512
Fetch = Callable[[NDArray[np.int64]], int]
"""Reads the images of these ids, and returns how many bytes they have."""


def images_of(count: int) -> Iterator[pa.Table]:
    """Row groups of 52 images."""
    draw = np.random.default_rng(0)
    noise = draw.bytes(64 * 2**20)
    for start in range(0, count, 52):
        sizes = draw.integers(60_000, 100_000, min(52, count - start)).tolist()
        data = [
            noise[at : at + size]
            for at, size in zip(draw.integers(0, 63 * 2**20, len(sizes)).tolist(), sizes, strict=True)
        ]
        ids = [schema.content_id(d) for d in data]
        fixed = [64] * len(data)
        yield pa.table([ids, data, fixed, fixed, [None] * len(data)], schema=schema.IMAGES)


def write_layouts(folder: Path, count: int, layouts: list[str]) -> None:
    """``images-LAYOUT/`` for each, and ``rows/``."""
    import lance

    per_part = PART_BYTES // 80_000 // 52 * 52
    ids: list[int] = []
    parts: dict[str, Any] = {}
    for number, group in enumerate(images_of(count)):
        ids += group["id"].to_pylist()
        if number * 52 % per_part == 0:
            for part in parts.values():
                part.close()
            for name in layouts:
                (folder / f"images-{name}").mkdir(parents=True, exist_ok=True)
                file = (folder / f"images-{name}" / f"part-{number:06d}.parquet").open("wb")
                if name in GROUPS:
                    parts[name] = pq.ParquetWriter(file, schema.IMAGES, compression="none", use_dictionary=False)
                elif name == "places":
                    parts[name] = ImagePartWriter(file)
        for name, part in parts.items():
            part.write(group) if name == "places" else part.write_table(group, row_group_size=GROUPS[name])
    for part in parts.values():
        part.close()
    if "lance" in layouts:
        batches = pa.RecordBatchReader.from_batches(
            schema.IMAGES, (b for table in images_of(count) for b in table.to_batches())
        )
        lance.write_dataset(batches, str(folder / "images-lance"))
    (folder / "rows").mkdir()
    words = np.random.default_rng(1).integers(10**5, 10**6, (1000, 40))
    for part_number, start in enumerate(range(0, len(ids), 100_000)):
        some = ids[start : start + 100_000]
        item = {"instruction": None, "image_at": []}
        rows = [
            {
                "id": schema.content_id(b"%d" % i),
                "source": "s",
                "key": str(i),
                "task": "t",
                "split": "train",
                "query": {"text": None, "images": [image], **item},
                "target": {"text": " ".join(map(str, words[i % 1000])), "images": [], **item},
                "negatives": [],
                "question": None,
                "answer": None,
            }
            for i, image in enumerate(some, start)
        ]
        table = pa.Table.from_pylist(rows, schema=schema.ROWS)
        options = {"use_dictionary": False, "write_statistics": ["id"], "row_group_size": schema.ROWS_ROW_GROUP_ROWS}
        pq.write_table(table, folder / "rows" / f"part-{part_number:06d}.parquet", compression="zstd", **options)


def by_places(images: Folder) -> Fetch:
    names = images.files(".parquet")
    index = ImageIndex.of(images, names, in_threads(lambda name: image_places(images, name), names))
    return lambda ids: sum(map(len, index.fetch(ids).values()))


def by_row_groups(images: Folder) -> Fetch:
    """Footers are kept; a row group is one request, and is read once a window."""
    names = images.files(".parquet")

    def scan(name: str) -> tuple[pq.FileMetaData, NDArray[np.int64]]:
        with open_part(images, name, whole=True) as file:
            reader = pq.ParquetFile(file)
            return reader.metadata, reader.read(columns=["id"], use_threads=False)["id"].to_numpy()

    scanned = in_threads(scan, names)
    ids = np.concatenate([found for _, found in scanned])
    size = scanned[0][0].row_group(0).num_rows
    order = np.argsort(ids)
    part = np.repeat(np.arange(len(names)), [len(found) for _, found in scanned])[order]
    row = np.concatenate([np.arange(len(found)) for _, found in scanned])[order]
    ids = ids[order]

    def fetch(wanted: NDArray[np.int64]) -> int:
        at = np.searchsorted(ids, np.unique(wanted))
        groups = np.unique(np.stack([part[at], row[at] // size]), axis=1).T.tolist()

        def read(place: tuple[int, int]) -> int:
            with open_part(images, names[place[0]], whole=False) as file:
                reader = pq.ParquetFile(file, metadata=scanned[place[0]][0], pre_buffer=True)
                table = reader.read_row_group(place[1], columns=["id", "bytes"], use_threads=False)
            chosen = table.filter(pc.is_in(table["id"], value_set=pa.array(wanted)))
            return int(sum(map(len, chosen["bytes"].to_pylist())))

        return sum(in_threads(read, groups))

    return fetch


def by_lance(images: Folder) -> Fetch:
    import lance

    options = {"allow_http": "true", "endpoint": os.environ.get("AWS_ENDPOINT_URL", "")}
    dataset = lance.dataset(images.uri, storage_options=None if images.is_local else options)
    ids = dataset.to_table(columns=["id"])["id"].to_numpy()
    order = np.argsort(ids)
    known = ids[order]

    def fetch(wanted: NDArray[np.int64]) -> int:
        rows = order[np.searchsorted(known, np.unique(wanted))]
        return int(sum(map(len, dataset.take(np.sort(rows).tolist(), columns=["bytes"])["bytes"].to_pylist())))

    return fetch


def by_objects(images: Folder) -> Fetch:
    """As training did: every part in Ray's object store, which spills to disk."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # the limits of ``session.connect``
    ray.init(address="local", num_cpus=4, object_store_memory=512 << 20, include_dashboard=False, log_to_driver=False)

    def read_part(name: str) -> tuple[NDArray[np.int64], pa.Table]:
        part = pq.read_table(images.path(name), columns=["id", "bytes"], filesystem=images.fs)
        return part["id"].to_numpy(), part

    read = ray.remote(num_cpus=0.25, num_returns=2)(read_part)
    parts = [read.remote(name) for name in images.files(".parquet")]
    id_lists = ray.get([ids for ids, _ in parts])
    ids = np.concatenate(id_lists)
    order = np.argsort(ids)
    part = np.repeat(np.arange(len(parts)), [len(found) for found in id_lists])[order]
    row = np.concatenate([np.arange(len(found)) for found in id_lists])[order]
    ids = ids[order]

    def fetch(wanted: NDArray[np.int64]) -> int:
        at, size = np.searchsorted(ids, np.unique(wanted)), 0
        for number in np.unique(part[at]).tolist():
            table = ray.get(parts[number][1])
            size += sum(len(table["bytes"][r].as_py()) for r in row[at][part[at] == number].tolist())
        return size

    return fetch


WAYS: dict[str, tuple[str, Callable[[Folder], Fetch]]] = {
    "places": ("places", by_places),
    **{f"row groups of {name}": (name, by_row_groups) for name in GROUPS},
    "Lance": ("lance", by_lance),
    "objects": ("places", by_objects),
}


def measure(way: str, folder: Folder, windows: int) -> dict[str, float]:
    """In a process of its own."""
    layout, open_way = WAYS[way]
    before = peak_mb()
    began = time.perf_counter()
    rows, parts = folder.child("rows"), folder.child("rows").files(".parquet")
    index = index_of(rows, parts, in_threads(lambda name: scan_part(rows, name, "train"), parts))
    fetch = open_way(folder.child(f"images-{layout}"))
    order = np.random.default_rng(7).permutation(len(index))

    def read(numbers: NDArray[np.int64]) -> None:
        content = content_of(index.select(numbers))
        ids = pc.list_flatten(pc.struct_field(content["query"].combine_chunks(), "images")).to_numpy()
        assert fetch(ids) > 50_000 * len(np.unique(ids))

    read(order[:FIRST])
    first_s, cpu = time.perf_counter() - began, time.process_time()
    began = time.perf_counter()
    taken = [order[FIRST + at * WINDOW : FIRST + (at + 1) * WINDOW] for at in range(windows)]
    for numbers in taken:
        read(numbers)
    count = sum(map(len, taken))
    return {
        "first_s": first_s,
        "rows_per_s": count / (time.perf_counter() - began),
        "cpu_ms": 1000 * (time.process_time() - cpu) / count,
        "memory_mb": peak_mb() - before,
    }


def peak_mb() -> float:
    """The most memory that this process had."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def _child(way: str, uri: str, windows: int, result: Any) -> None:
    try:
        result.put(measure(way, Folder.at(uri), windows))
    except BaseException as error:  # the parent waits for an answer
        result.put({"error": repr(error)[:200]})


def run(way: str, uri: str, windows: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_child, args=(way, uri, windows, result))
    process.start()
    found: dict[str, Any] = result.get()
    process.join()
    return found


def forget(folder: Path) -> None:
    """Drop the page cache of the files, as on a machine that has not read them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bench(gb: float, folder: Path, ways: list[str], windows: int, s3: S3Server | None) -> list[dict[str, Any]]:
    count = int(gb * 1e9 / 80_000)
    layouts = sorted({WAYS[way][0] for way in ways})
    write_layouts(folder, count, layouts)
    uri = str(folder)
    if s3 is not None:
        import s3fs

        uri = f"s3://{s3.bucket}/reads"
        s3fs.S3FileSystem().put(str(folder), f"{s3.bucket}/reads", recursive=True)
    lines = []
    for way in ways:
        forget(folder)
        if s3 is not None:
            forget(s3._folder)
        free = shutil.disk_usage(folder).free
        found = run(way, uri, windows)
        layout = folder / f"images-{WAYS[way][0]}"
        found |= {"extra_disk_mb": (free - shutil.disk_usage(folder).free) / 1e6 if way == "objects" else 0.0}
        found |= {"layout_mb": size_of(layout) / 1e6}
        lines.append({"gb": gb, "store": "s3" if s3 else "local", "way": way, **found})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    head = "| GB | from | way | first batch | rows/s | CPU a row | memory |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {x['gb']:g} | {x['store']} | {x['way']} | "
        + (
            x["error"]
            if "error" in x
            else f"{x['first_s']:.1f} s | {x['rows_per_s']:.0f} | {x['cpu_ms']:.2f} ms | {x['memory_mb']:.0f} MB"
        )
        + " |"
        for x in lines
    )


def bench_index(count: int) -> None:
    """CPU time and memory of the indexes of ``count`` rows and images, without reading."""
    draw, clock = np.random.default_rng(0), time.process_time()
    places = np.zeros(count, PLACE)
    places["id"], places["length"] = draw.integers(-(2**62), 2**62, count), 80_000

    def lap(what: str, size: int = 0) -> None:
        nonlocal clock
        print(f"{what}: {time.process_time() - clock:.2f} s" + (f", {size / 1e6:.0f} MB" if size else ""), flush=True)
        clock = time.process_time()

    lap("ids drawn")
    images = ImageIndex.of(Folder("/nowhere"), ["p"] * 4000, np.array_split(places, 4000))
    lap(f"index of {count:,} images", sum(a.nbytes for a in (images.ids, images.part, images.start, images.length)))
    images.ids.searchsorted(draw.choice(images.ids, 2048))
    lap("2,048 images looked up")
    labels = Labels(("a", "b"), draw.integers(0, 2, count).astype(np.int32))
    small = np.zeros(count, np.int32)
    flags = draw.random(count) < 0.7
    rows = RowIndex(Folder("/nowhere"), ("p",), images.ids, small, small, labels, labels, labels, flags, flags)
    clock = time.process_time()
    rows = rows.select(np.argsort(rows.ids))
    lap(f"index of {count:,} rows in order", 30 * count)
    plan = rows.plan(load_config("micro"))
    lap("plan", plan.tasks.nbytes + plan.retrieval.nbytes + plan.heterogeneous.nbytes)
    plan.step(0)
    lap("permutation of an epoch", plan.retrieval.nbytes)
    plan.step(1)
    lap("a step")


@contextmanager
def s3_server(place: Path) -> Iterator[S3Server]:
    folder = Path(tempfile.mkdtemp(prefix="crem-s3-", dir=place))
    server = S3Server(folder)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_REGION": server.region,
        "AWS_DEFAULT_REGION": server.region,
    }
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bench-reads")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--s3", action="store_true", help="from a SeaweedFS started here")
    parser.add_argument("--index", type=int, default=0)
    args = parser.parse_args(argv)
    if args.index:
        bench_index(args.index)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for gb in args.gb:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            if args.s3:
                with s3_server(args.folder) as server:
                    lines += bench(gb, folder, args.ways, args.windows, server)
            else:
                lines += bench(gb, folder, args.ways, args.windows, None)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(lines))


if __name__ == "__main__":
    main()
