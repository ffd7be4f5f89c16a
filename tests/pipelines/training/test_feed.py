"""The stream of a rank: the examples of the plan, whatever fails on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import s3fs

from cluster.local import LocalCluster
from crem.data.items import TrainingExample
from crem.errors import ConfigError
from pipelines.tables.prepared import index_images, index_rows, read_rows
from pipelines.training.feed import WindowSize, step_batches
from tests.pipelines.tables.written import write_tables
from tests.pipelines.training.streamed import RANK, RANKS, PassOn, config, digest


def oracle(prepared: str, steps: int) -> Iterator[list[TrainingExample]]:
    """The examples of each step, from rows that are read whole."""
    rows, c = read_rows(prepared, split_prefix="train"), config(steps)
    plan = index_rows(prepared, split_prefix="train").plan(c)
    for step in range(steps):
        share = plan.step(step, rank=RANK, ranks=RANKS)
        yield rows.examples(share.rows, share.z, (c.train.seed, step))


def test_windows_grow_to_their_bounds() -> None:
    size = WindowSize(rows_per_step=16)
    seen = []
    for _ in range(5):
        seen.append(size.steps)
        size.seen(size.steps, size.steps * 16 * 1000)  # images of a kilobyte
    assert seen == [4, 16, 64, 128, 128], "2,048 rows at most"
    size.seen(10, 10 * 16 * 2**20)
    assert size.steps == 4, "64 rows of a megabyte"
    size.seen(1, 16 * 2**30)
    assert size.steps == 1, "a step is not divided"


@pytest.mark.ray
@pytest.mark.parametrize("start", [0, 5])
def test_the_stream_is_that_of_rows_read_whole(start: int, local_ray: None, tmp_path: Path) -> None:
    prepared = write_tables(tmp_path / "prepared")
    rows, images = index_rows(prepared, split_prefix="train"), ray.put(index_images(prepared))
    wanted = list(oracle(prepared, 14))[start:]
    stream: Any = step_batches(rows, images, config(14), PassOn(), start_step=start, rank=RANK, ranks=RANKS)  # type: ignore[arg-type]
    got = [[example for chunk in chunks for example in chunk] for chunks in stream]
    assert got == wanted
    assert any(e.query.image_at for examples in got for e in examples)


@pytest.mark.ray
def test_a_part_that_is_gone_ends_the_stream_by_its_name(local_ray: None, tmp_path: Path) -> None:
    prepared = write_tables(tmp_path / "prepared")
    rows, images = index_rows(prepared, split_prefix="train"), ray.put(index_images(prepared))
    (Path(prepared) / "images" / "part-000002.parquet").unlink()
    stream = step_batches(rows, images, config(4), PassOn(), start_step=0, rank=RANK, ranks=RANKS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"images/part-000002\.parquet is missing; run crem prepare again"):
        list(stream)


class Streamed:
    """``streamed.py`` as a process; its steps as they come."""

    def __init__(self, prepared: str, steps: int, pause_s: float, env: dict[str, str], log: Path):
        command = [sys.executable, "-m", "tests.pipelines.training.streamed", prepared, str(steps), str(pause_s)]
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=Path(__file__).parents[3]
        )
        self.digests: dict[int, str] = {}

    def read(self, until: int) -> None:
        assert self.process.stdout is not None
        while len(self.digests) < until:
            line = self.process.stdout.readline()
            assert line, Path(self._log.name).read_text()[-3000:]
            if line.startswith("["):
                step, found = json.loads(line)
                self.digests[step] = found

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.mark.ray
@pytest.mark.slow
def test_storage_that_is_away_for_half_a_minute(s3_server: Any, s3_env: Any, tmp_path: Path) -> None:
    local = write_tables(tmp_path / "prepared")
    s3fs.S3FileSystem().put(local, f"{s3_server.bucket}/feed", recursive=True)
    steps, env = 60, {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with Streamed(f"s3://{s3_server.bucket}/feed", steps, 0.05, env, tmp_path / "log") as stream:
        stream.read(3)
        s3_server.kill()
        back = threading.Timer(30, s3_server.start)
        began = time.monotonic()
        back.start()
        try:
            stream.read(steps)
        finally:
            back.join()
        assert time.monotonic() - began > 25, "it had to wait"
    assert [stream.digests[step] for step in range(steps)] == [digest(e) for e in oracle(local, steps)]


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_dies_costs_its_windows(tmp_path: Path) -> None:
    prepared = write_tables(tmp_path / "prepared")
    steps = 40
    with (
        LocalCluster(2, cpus_per_node=2) as nodes,
        Streamed(prepared, steps, 0.3, nodes.env, tmp_path / "log") as stream,
    ):
        stream.read(3)
        nodes.kill_node(1)
        stream.read(steps)
    assert [stream.digests[step] for step in range(steps)] == [digest(e) for e in oracle(prepared, steps)]
