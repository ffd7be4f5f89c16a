"""Drills of ``crem embed``: real processes are killed, cut off and filled up at random moments of a real job.

    python -m tests.pipelines.embedding.drills --count 20 --seed 1

The job embeds a table on S3 into a folder on S3, on a Ray cluster of three nodes (``drill_cluster``). After each drill
its output is compared with that of the undisturbed job, sorted by id. It prints a table and ends with ``lost 0,
doubled 0``, and with status 1 if a row was lost, doubled or changed, or more work was redone than was in flight. Needs
root and Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from pipelines.embedding.embed_run import _CALLS_PER_ACTOR
from pipelines.embedding.output import EmbedManifest, parts_of, read_ledgers
from pipelines.tables.storage import Folder
from tests.pipelines.embedding.drill_cluster import FAULTY, DrillCluster

__all__ = ["KINDS", "Drill", "DrillRun", "main", "write_items"]

ROWS, PIECE, ACTORS = 1200, 4, 3
SETTINGS = [f"embed.rows_per_task={PIECE}", f"embed.max_actors={ACTORS}", "embed.cpus_per_task=0.9"]
SETTINGS += ["embed.item_timeout_s=20", "embed.batch_size=4"]
JOB_TIMEOUT_S = 1200


@dataclass
class Drill:
    """What came of one job and what was done to it."""

    kinds: tuple[str, ...]
    moments: tuple[float, ...] = ()
    """Shares of the pieces that were staged when it was done; poison is there from the start."""
    outcome: str = ""
    embedded_again: int = 0
    prepared_again: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return self.outcome == "well" and not (self.lost or self.doubled or self.changed)

    def line(self) -> str:
        moments = " ".join(f"{moment:.0%}" for moment in self.moments)
        return (
            f"{' '.join(self.kinds):<32} {moments:<15} {self.outcome:<18.18} {self.embedded_again:>8} "
            f"{self.prepared_again:>8} {self.lost:>4} {self.doubled:>7} {self.changed:>7} {self.seconds:>7.0f}"
        )


HEADER = f"{'kinds':<32} {'moments':<15} {'outcome':<18} embedded prepared lost doubled changed seconds"
"""``embedded`` and ``prepared`` are rows that were done once more."""


def write_items(path: Path, rows: int = ROWS, poison: Iterable[str] = ()) -> None:
    """Texts and small pictures, some of them bad, as Parquet; ``poison`` has further rows, spread over the others."""
    draw, items = random.Random(7), []
    words = ["apple", "river", "stone", "green", "seven", "walks", "under", "light"]
    for number in range(rows):
        text = " ".join(draw.choice(words) for _ in range(draw.randrange(1, 24)))
        items.append({"id": f"item-{number:05d}", "text": text, "image": _png(number) if number % 5 == 0 else None})
        if number % 97 == 0:
            items[-1] |= {"text": None, "image": b"no picture" if number % 2 else None}
    for number, kind in enumerate(poison):
        image = None if kind == "model" else _png(number, f"drill-{kind}")
        bad = {"id": f"poison-{kind}-{number}", "text": "stone " * 60 if kind == "model" else "a", "image": image}
        items.insert(draw.randrange(len(items)), bad)
    schema = pa.schema([("id", pa.string()), ("text", pa.string()), ("image", pa.binary())])
    pq.write_table(pa.Table.from_pylist(items, schema), path, row_group_size=100)


def _png(seed: int, mark: str = "") -> bytes:
    pixels, out = np.random.default_rng(seed).integers(0, 255, (24, 20, 3), np.uint8), io.BytesIO()
    info = PngImagePlugin.PngInfo()
    if mark:
        info.add_text("comment", mark)
    Image.fromarray(pixels).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def rows_of(place: str) -> list[dict[str, Any]]:
    """The rows of an output, sorted by id."""
    folder, rows = Folder.at(place), []
    for part in parts_of(read_ledgers(folder)):
        rows += pq.read_table(pa.BufferReader(folder.read_bytes(part.name))).to_pylist()
    return sorted(rows, key=lambda row: str(row["id"]))


def compare(drill: Drill, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Count what is lost, doubled and changed; vectors may differ by rounding."""
    counts, wanted = Counter(row["id"] for row in found), {row["id"]: row for row in expected}
    drill.lost = sum(name not in counts for name in wanted)
    drill.doubled = sum(count - 1 for count in counts.values())
    for row in found:
        other = wanted.get(row["id"])
        if row["id"].startswith("poison-"):
            reason = "timed_out" if "endless" in row["id"] else "killed_its_process"
            drill.changed += row["embedding"] is not None or not str(row["error"]).startswith(reason)
        elif other is None:
            drill.changed += 1
        else:
            plain = all(row[name] == other[name] for name in other if name != "embedding")
            vectors = (row["embedding"], other["embedding"])
            near = vectors[0] is vectors[1] or (None not in vectors and np.abs(np.subtract(*vectors)).max() < 1e-6)
            drill.changed += not (plain and near)


class DrillRun:
    """The cluster, the input and the undisturbed output of a series of drills."""

    def __init__(self, cluster: DrillCluster, folder: Path, model: str, rows: int = ROWS):
        self.cluster, self.folder, self.model, self.rows = cluster, folder, model, rows
        self.bucket = Folder.at(f"s3://{cluster.s3.bucket}")
        self.number = 0
        write_items(folder / "items.parquet", rows)
        self.bucket.upload(str(folder / "items.parquet"), "items", "items.parquet")
        self.expected: list[dict[str, Any]] = []
        undisturbed = Drill(())
        self._finish(undisturbed, self.out(), self.start(self.source(), self.out()))
        assert undisturbed.outcome == "well", undisturbed
        self.seconds = undisturbed.seconds

    def source(self, name: str = "items") -> str:
        return f"{self.bucket.uri}/{name}"

    def out(self) -> str:
        return f"{self.bucket.uri}/out-{self.number}"

    def start(self, source: str, out: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "crem.cli", "embed", source, "--model", self.model, "--out", out, *SETTINGS]
        with (self.folder / "job.log").open("ab") as log:
            log.write(f"\n# {' '.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command, env=env or {**os.environ, **self.cluster.ray.env}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def drill(self, kinds: Sequence[str], draw: random.Random) -> Drill:
        """One job of a new output, and all of this done to it; a full disk is on its own."""
        self.number += 1
        kills = [kind for kind in kinds if kind in KILLS]
        moments = sorted(draw.uniform(0.05, 0.9) for _ in kills or kinds)
        began, drill = time.monotonic(), Drill(tuple(kinds), tuple(moments))
        source, poison = self.source(), [item for kind in kinds for item in POISON.get(kind, ())]
        if poison:
            write_items(self.folder / "poison.parquet", self.rows, poison)
            source = self.source(f"poison-{self.number}")
            self.bucket.upload(str(self.folder / "poison.parquet"), f"poison-{self.number}", "items.parquet")
        if "disk" in kinds:
            self._fill_a_disk(drill)
        else:
            job = self.start(source, self.out())
            for number, (kind, moment) in enumerate(zip(kills, moments, strict=False)):
                if not self._wait_for(job, moment):  # then only what was done counts
                    drill.kinds = (*kills[:number], *(kind for kind in kinds if kind in POISON))
                    drill.moments = drill.moments[:number]
                    break
                time.sleep(draw.uniform(0, 1))
                KILLS[kind](self, job, draw)
                if kind == "driver":
                    job.wait()
                    job = self.start(source, self.out())
            self._finish(drill, self.out(), job)
            self.cluster.restore()
        drill.seconds = time.monotonic() - began
        return drill

    def _staged(self, out: str) -> float:
        """Share of the pieces that are staged or committed."""
        folder, pieces = Folder.at(out), -(-self.rows // PIECE)
        staged = 0
        for plan in folder.child("_work").folders():
            place = folder.child("_work").child(plan).child("staged")
            staged += sum(len(place.child(shard).files(".arrow")) for shard in place.folders())
        return (staged + sum(ledger.pieces for ledger in read_ledgers(folder))) / pieces

    def _wait_for(self, job: subprocess.Popen[bytes], moment: float) -> bool:
        """Whether the job came to the moment before it ended."""
        while job.poll() is None:
            if self._staged(self.out()) >= moment:
                return True
            time.sleep(0.2)
        return False

    def _finish(self, drill: Drill, out: str, job: subprocess.Popen[bytes]) -> None:
        """Wait for the job, and compare its output."""
        began = time.monotonic()
        try:
            code = job.wait(JOB_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            drill.outcome = f"no end in {JOB_TIMEOUT_S} s"
            return
        drill.seconds = time.monotonic() - began
        manifest = EmbedManifest.read(Folder.at(out))
        if code or manifest is None:
            drill.outcome = f"ended with status {code}"
            return
        drill.outcome = "well"
        drill.embedded_again, drill.prepared_again = manifest.embedded_again, manifest.prepared_again
        found = rows_of(out)
        if self.expected:
            compare(drill, found, self.expected)
            rows = len(self.expected) + sum(len(POISON.get(kind, ())) for kind in drill.kinds)
            if not manifest.rows_out == len(found) == rows:
                drill.outcome = f"{len(found)} rows"
                drill.said.append(f"{rows} rows went in, {len(found)} came out, the manifest says {manifest.rows_out}")
        self.expected = self.expected or found
        most = sum(in_flight(kind) for kind in drill.kinds)
        if drill.embedded_again > most:
            drill.outcome = "too much again"
            drill.said.append(f"{most} rows were in flight at most")

    def _fill_a_disk(self, drill: Drill) -> None:
        """The output is on a disk of so few bytes; the job must end in words, and continue when there are more."""
        disk = self.folder / f"disk-{self.number}"
        disk.mkdir()
        size_kb = int(100 + self.rows * 2 * drill.moments[0])
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(disk)], check=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
        log = self.folder / "job.log"
        try:
            at = log.stat().st_size
            job = self.start(self.source(), str(disk / "out"), env)
            code = job.wait(JOB_TIMEOUT_S)
            said = log.read_bytes()[at:].decode(errors="replace").strip().splitlines()
            drill.said = said[-3:]
            if code == 0 or not any(line.startswith("crem embed: no space left") for line in said[-4:]):
                drill.outcome = f"status {code}"
                return
            if any("Traceback" in line for line in said):
                drill.outcome = "a traceback"
                return
            subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
            out = str(disk / "out")
            self._finish(drill, out, self.start(self.source(), out, env))
            drill.said.clear()
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)


def _kill_driver(run: DrillRun, job: subprocess.Popen[bytes], draw: random.Random) -> None:
    os.killpg(job.pid, signal.SIGKILL)


def _kill_process(title: str) -> Callable[[DrillRun, subprocess.Popen[bytes], random.Random], None]:
    def kill(run: DrillRun, job: subprocess.Popen[bytes], draw: random.Random) -> None:
        while job.poll() is None:
            if found := run.cluster.processes(title):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(draw.choice(found).pid, signal.SIGKILL)
                return
            time.sleep(0.02)

    return kill


def _kill_node(run: DrillRun, job: subprocess.Popen[bytes], draw: random.Random) -> None:
    run.cluster.kill(run.cluster.any_worker(draw))


def _cut_off(run: DrillRun, job: subprocess.Popen[bytes], draw: random.Random) -> None:
    worker = run.cluster.any_worker(draw)
    run.cluster.cut(worker)
    time.sleep(60)
    run.cluster.heal(worker)


def _preempt(run: DrillRun, job: subprocess.Popen[bytes], draw: random.Random) -> None:
    worker = run.cluster.any_worker(draw)
    run.cluster.drain(worker, 10)
    time.sleep(10)
    run.cluster.kill(worker)


def _kill_server(run: DrillRun, job: subprocess.Popen[bytes], draw: random.Random) -> None:
    run.cluster.s3.kill()
    time.sleep(20)
    run.cluster.s3.start()


KILLS: dict[str, Callable[[DrillRun, subprocess.Popen[bytes], random.Random], None]] = {
    "driver": _kill_driver,
    "actor": _kill_process("ray::MapWorker(MapBatches(WindowEmbedder))"),
    "worker": _kill_process("ray::MapBatches(WindowMaker)"),
    "node": _kill_node,
    "partition": _cut_off,
    "preempted": _preempt,
    "s3": _kill_server,
}
POISON = {"poison": ("segfault", "segfault", "model"), "endless": ("endless",)}
KINDS = (*KILLS, "disk", *POISON)


def in_flight(kind: str) -> int:
    """Most rows that may be embedded again because of this: the windows that are begun in the actors that die of it."""
    window = _CALLS_PER_ACTOR * PIECE
    if kind in POISON:  # two usual attempts of an actor for each window that kills it, and the window by itself
        return 2 * POISON[kind].count("model") * window + window
    return window * {"disk": 4, "driver": ACTORS, "node": ACTORS, "partition": ACTORS, "preempted": ACTORS}.get(kind, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--together", type=int, default=1, help="drills of one job; a job takes minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--model", default="crem/checkpoints/crem-micro")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--folder", type=Path, help="of the jobs' log; by default one that is removed at the end")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nodes and networks are removed then too
    draw = random.Random(chosen.seed)
    kinds = [chosen.kinds[number % len(chosen.kinds)] for number in range(chosen.count)]
    draw.shuffle(kinds)
    disks = [kind for kind in kinds if kind == "disk"]
    others = [kind for kind in kinds if kind != "disk"]
    drills: list[Drill] = []
    with contextlib.ExitStack() as stack:
        folder = chosen.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="drills-")))
        folder.mkdir(exist_ok=True)
        cluster = stack.enter_context(DrillCluster(folder))
        run = DrillRun(cluster, folder, str(Path(chosen.model).absolute()), chosen.rows)
        print(f"undisturbed: {len(run.expected)} rows in {run.seconds:.0f} s, seed {chosen.seed}\n{HEADER}", flush=True)
        while others or disks:
            drills.append(run.drill(others[: chosen.together] or [disks.pop()], draw))
            for kind in drills[-1].kinds:
                if kind in others:
                    others.remove(kind)
            print(drills[-1].line(), *drills[-1].said, sep="\n  ", flush=True)
        (folder / "drills.json").write_text(json.dumps([vars(drill) for drill in drills], indent=1))
    bad = sum(not drill.is_well for drill in drills)
    lost, doubled = sum(drill.lost for drill in drills), sum(drill.doubled for drill in drills)
    done = sum(len(drill.kinds) for drill in drills)
    print(f"{done} drills in {len(drills)} jobs, {bad} jobs not well: lost {lost}, doubled {doubled}")
    return 1 if bad else 0


if __name__ == "__main__":
    assert FAULTY.is_dir()
    raise SystemExit(main())
