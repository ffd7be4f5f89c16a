"""How training may read single images: by places in Parquet, by row groups, by Lance, from Ray's objects.

    python -m tests.bench.bench_reads [--gb 1 4 16] [--s3] [--folder /tmp/bench-reads]

For each size it writes tables of random images of 60 to 100 kB and a row for each, once in every layout, deleted before
the next. Each way runs in a process of its own with a Ray of its own, as ``crem train`` starts it, and with a dropped
page cache: the time from then until a first batch of 64 random rows is in the driver, and rows a second for windows of
512 random rows. As in the feed, a window is read by a task, and two are read at once. The memory is the most that the
driver and all workers together had of their own, and the pages that the object store had touched (its limit is that of
``pipelines.tables.session``). ``spilled`` is what Ray wrote to disk. ``objects`` is how training read before: all parts
go to the object store first.
``--index ROWS`` prints what the indexes of so many rows and images cost instead, and ``--footers ROWS`` what
the footers of a part of so many rows take.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import s3fs
from numpy.typing import NDArray

from crem.config import load_config
from pipelines.tables import schema, session
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
SAMPLE_S = 0.05
ROWS_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": False,
    "write_statistics": ["id"],
    "row_group_size": schema.ROWS_ROW_GROUP_ROWS,
}
"""How the project stores rows."""
Fetch = Callable[[NDArray[np.int64]], list[bytes]]
"""Reads the images of these ids, each once."""


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
    for number, start in enumerate(range(0, len(ids), 100_000)):
        path = folder / "rows" / f"part-{number:06d}.parquet"
        pq.write_table(rows_of(ids[start : start + 100_000], start), path, **ROWS_OPTIONS)


def rows_of(images: list[int], start: int = 0) -> pa.Table:
    """A row for each image, with 40 words."""
    words = np.random.default_rng(1).integers(10**5, 10**6, (1000, 40))
    item: dict[str, Any] = {"instruction": None, "image_at": []}
    rows: list[dict[str, Any]] = [
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
        for i, image in enumerate(images, start)
    ]
    return pa.Table.from_pylist(rows, schema=schema.ROWS)


def bench_footers(count: int) -> None:
    """Bytes of footer a row, by rows of a row group, with and without what ``ROWS_OPTIONS`` leave out."""
    rows = rows_of(list(range(count)))
    print("| rows of a row group | options | footer, bytes a row |\n|---|---|---|")
    for size in (64, 256, 1024, 4096):
        for name, options in (("as stored", ROWS_OPTIONS), ("PyArrow's defaults", {"compression": "zstd"})):
            sink = pa.BufferOutputStream()
            pq.write_table(rows, sink, **{**options, "row_group_size": size})
            stored = sink.getvalue()
            footer = int.from_bytes(stored.slice(len(stored) - 8, 4).to_pybytes(), "little")
            print(f"| {size} | {name} | {footer / count:.1f} |")


def by_places(images: Folder) -> Fetch:
    names = images.files(".parquet")
    index = ImageIndex.of(images, names, in_threads(lambda name: image_places(images, name), names))
    return lambda ids: list(index.fetch(ids).values())


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

    def fetch(wanted: NDArray[np.int64]) -> list[bytes]:
        at = np.searchsorted(ids, np.unique(wanted))
        groups = np.unique(np.stack([part[at], row[at] // size]), axis=1).T.tolist()

        def read(place: tuple[int, int]) -> list[bytes]:
            with open_part(images, names[place[0]], whole=False) as file:
                reader = pq.ParquetFile(file, metadata=scanned[place[0]][0], pre_buffer=True)
                table = reader.read_row_group(place[1], columns=["id", "bytes"], use_threads=False)
            chosen = table.filter(pc.is_in(table["id"], value_set=pa.array(wanted)))
            found: list[bytes] = chosen["bytes"].to_pylist()
            return found

        return [image for group in in_threads(read, groups) for image in group]

    return fetch


def by_lance(images: Folder) -> Fetch:
    import lance

    options = {"allow_http": "true", "endpoint": os.environ.get("AWS_ENDPOINT_URL", "")}
    dataset = lance.dataset(images.uri, storage_options=None if images.is_local else options)
    ids = dataset.to_table(columns=["id"])["id"].to_numpy()
    order = np.argsort(ids)
    known = ids[order]

    def fetch(wanted: NDArray[np.int64]) -> list[bytes]:
        rows = order[np.searchsorted(known, np.unique(wanted))]
        images: list[bytes] = dataset.take(np.sort(rows).tolist(), columns=["bytes"])["bytes"].to_pylist()
        return images

    return fetch


def by_objects(images: Folder) -> Fetch:
    """As training did before 1ad27d8 (``share_rows``): every part in Ray's object store, which spills to disk."""

    def read_part(name: str) -> tuple[NDArray[np.int64], pa.Table]:
        part = pq.read_table(images.path(name), columns=["id", "bytes"], filesystem=images.fs)
        return part["id"].to_numpy(), part

    read = ray.remote(num_cpus=1, num_returns=2)(read_part)
    parts = [read.remote(name) for name in images.files(".parquet")]
    id_lists = ray.get([ids for ids, _ in parts])
    ids = np.concatenate(id_lists)
    order = np.argsort(ids)
    part = np.repeat(np.arange(len(parts)), [len(found) for found in id_lists])[order]
    row = np.concatenate([np.arange(len(found)) for found in id_lists])[order]
    ids = ids[order]

    def fetch(wanted: NDArray[np.int64]) -> list[bytes]:
        at, found = np.searchsorted(ids, np.unique(wanted)), []
        for number in np.unique(part[at]).tolist():
            table = ray.get(parts[number][1])  # mapped, not copied
            found += [table["bytes"][r].as_py() for r in row[at][part[at] == number].tolist()]
        return found

    return fetch


def by_nothing(ids: NDArray[np.int64]) -> list[bytes]:
    return [b"" for _ in ids]


WAYS: dict[str, tuple[str, Callable[[Folder], Fetch]]] = {
    "places": ("places", by_places),
    **{f"row groups of {name}": (name, by_row_groups) for name in GROUPS},
    "Lance": ("lance", by_lance),
    "objects": ("places", by_objects),
}


def measure(way: str, folder: Folder, windows: int, most_s: float, spill: str) -> dict[str, float]:
    """In a process of its own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=session._OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        object_spilling_directory=spill,
    )
    read = ray.remote(num_cpus=1)(read_window)
    none = index_of(folder, [], [])
    ray.get([read.remote(none, by_nothing) for _ in range(4)])  # now the workers have imported what they need
    layout, open_way = WAYS[way]
    images, began = folder.child(f"images-{layout}"), time.perf_counter()
    # who makes an object owns it, so that the former way opens in the driver
    fetch = ray.put(open_way(images)) if way == "objects" else ray.remote(num_cpus=1)(open_way).remote(images)
    rows, parts = folder.child("rows"), folder.child("rows").files(".parquet")
    index = index_of(rows, parts, in_threads(lambda name: scan_part(rows, name, "train"), parts))
    order = np.random.default_rng(7).permutation(len(index))

    def begin(window: int) -> ray.ObjectRef:
        at = FIRST + window * WINDOW
        return read.remote(index.select(order[at : at + WINDOW]), fetch)

    ray.get(read.remote(index.select(order[:FIRST]), fetch))
    first_s, began, count = time.perf_counter() - began, time.perf_counter(), 0
    ahead = [begin(window) for window in range(2)]
    for window in range(2, windows + 2):
        got = len(ray.get(ahead.pop(0)))
        count += got
        if not got or time.perf_counter() - began > most_s:
            break
        ahead.append(begin(window))
    return {"first_s": first_s, "rows_per_s": count / (time.perf_counter() - began)}


def read_window(rows: RowIndex, fetch: Fetch) -> list[bytes]:
    """In a task: the images of some rows."""
    if not len(rows):
        return []
    content = content_of(rows)
    ids = pc.list_flatten(pc.struct_field(content["query"].combine_chunks(), "images")).to_numpy()
    images = fetch(ids)
    assert len(images) == len(np.unique(ids)) and min(map(len, images)) >= 60_000
    return images


@dataclass
class Peaks:
    """The most that a process and Ray's processes below it took, in MB, seen by sampling."""

    driver_mb: float = 0
    workers_mb: float = 0
    """of all workers together"""
    objects_mb: float = 0
    spilled_mb: float = 0

    def sample(self, driver: psutil.Process, spill: Path) -> None:
        own, objects, workers = _own_mb(driver.pid), 0.0, 0.0
        for child in driver.children(recursive=True):
            with suppress(psutil.Error, OSError):
                name = "".join(child.cmdline()[:1])
                if name.startswith("ray::"):
                    workers += _own_mb(child.pid)
                elif name.endswith("/raylet"):
                    objects = _object_store_mb(child.pid)
        spilled = sum(path.stat().st_blocks * 512 for path in spill.rglob("*") if path.is_file()) / 1e6
        self.driver_mb, self.workers_mb = max(self.driver_mb, own), max(self.workers_mb, workers)
        self.objects_mb, self.spilled_mb = max(self.objects_mb, objects), max(self.spilled_mb, spilled)


def _own_mb(pid: int) -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def _object_store_mb(raylet: int) -> float:
    """Pages of the file that Ray's processes share, which has no name any more."""
    files = Path(f"/proc/{raylet}/fd").iterdir()
    return max((file.stat().st_blocks * 512 for file in files if "plasma" in os.readlink(file)), default=0) / 1e6


def _child(way: str, uri: str, windows: int, most_s: float, spill: str, result: Any) -> None:
    from tests.bench import bench_reads  # Ray's workers import it by this name, not as __main__

    try:
        result.put(bench_reads.measure(way, Folder.at(uri), windows, most_s, spill))
    except BaseException as error:  # the parent waits for an answer
        result.put({"error": repr(error)[:200]})


def run(way: str, uri: str, windows: int, most_s: float, spill: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_child, args=(way, uri, windows, most_s, str(spill), result))
    process.start()
    peaks, found = Peaks(), None
    while found is None and process.is_alive():
        with suppress(psutil.Error, OSError):
            peaks.sample(psutil.Process(process.pid), spill)
        with suppress(queue.Empty):
            found = result.get(timeout=SAMPLE_S)
    process.join()
    return (found or {"error": f"ended with {process.exitcode}"}) | asdict(peaks)


def forget(folder: Path) -> None:
    """Drop the page cache of the files, as on a machine that has not read them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bench(gb: float, folder: Path, args: argparse.Namespace, s3: S3Server | None) -> list[dict[str, Any]]:
    count = int(gb * 1e9 / 80_000)
    lines: list[dict[str, Any]] = []
    for layout in sorted({WAYS[way][0] for way in args.ways}):
        tables = folder / layout.replace(" ", "-")
        write_layouts(tables, count, [layout])
        uri, size_mb = str(tables), size_of(tables / f"images-{layout}") / 1e6
        if s3 is not None:
            uri = f"s3://{s3.bucket}/{tables.name}"
            s3fs.S3FileSystem().put(str(tables), f"{s3.bucket}/{tables.name}", recursive=True)
            shutil.rmtree(tables)
        for way in [way for way in args.ways if WAYS[way][0] == layout]:
            forget(folder if s3 is None else s3._folder)
            with tempfile.TemporaryDirectory(dir=folder) as spill:
                found = run(way, uri, args.windows, args.most_s, Path(spill))
            lines.append({"gb": gb, "store": "S3" if s3 else "disk", "way": way, "stored_mb": size_mb, **found})
            print(json.dumps(lines[-1]), flush=True)
        if s3 is not None:
            s3fs.S3FileSystem().rm(uri, recursive=True)
        shutil.rmtree(tables, ignore_errors=True)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    head = "| GB | from | way | first batch | rows/s | driver | workers | object store | spilled | stored |\n"
    head += "|---|---|---|---|---|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {x['gb']:g} | {x['store']} | {x['way']} | "
        + (x["error"] if "error" in x else f"{x['first_s']:.1f} s | {x['rows_per_s']:.0f}")
        + "".join(f" | {x[name]:,.0f} MB" for name in ("driver_mb", "workers_mb", "objects_mb", "spilled_mb"))
        + f" | {x['stored_mb']:,.1f} MB |"
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
    s3fs.S3FileSystem.clear_instance_cache()  # of a server before this one
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
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--most-s", type=float, default=60, help="no further window is begun after so many seconds")
    parser.add_argument("--s3", action="store_true", help="from a SeaweedFS started here")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--footers", type=int, default=0)
    args = parser.parse_args(argv)
    if args.footers:
        bench_footers(args.footers)
        return
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
                    lines += bench(gb, folder, args, server)
            else:
                lines += bench(gb, folder, args, None)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(lines))


if __name__ == "__main__":
    main()
