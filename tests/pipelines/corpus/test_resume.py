"""A preparation that is interrupted anywhere continues and ends with the bytes of one that was not."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.config import RunConfig, load_config
from crem.errors import ConfigError, StorageError
from pipelines.corpus import part_cuts
from pipelines.corpus.prepare import prepare
from pipelines.corpus.publish import publish
from pipelines.corpus.verify import verify
from pipelines.tables import ray_tasks
from pipelines.tables.lease import Lease
from pipelines.tables.manifest import PrepareManifest, table_parts
from pipelines.tables.storage import Folder, JobKind
from tests.pipelines.conftest import encoded, random_image, write_rows
from tests.s3_server import S3Server

pytestmark = pytest.mark.ray

SETTINGS = ["prepare.rows_per_task=3"]


def config(*settings: str) -> RunConfig:
    return load_config("micro", [*SETTINGS, *settings])


def write_corpus(folder: Path, rows: int = 40, images: int = 12) -> Path:
    """Rows that share images, some of them twice and some bad."""
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        (folder / "images" / f"{number}.png").write_bytes(encoded(random_image(number, (60 + number, 50))))
    lines: list[dict[str, Any]] = [
        {"key": str(i % (rows - 3)), "query_images": [f"{i % (images + 1)}.png"], "target_text": f"t{i}"}
        for i in range(rows)
    ]
    write_rows(folder / "rows" / "a.jsonl", lines[: rows // 2])
    write_rows(folder / "rows" / "b.parquet", lines[rows // 2 :])
    return folder


def content(out: Path) -> dict[str, bytes]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("resume") / "c")


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(str(corpus), str(out), config())
    return content(out)


def interrupted_after(results: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the driver die after so many results of tasks."""
    left, stream = itertools.count(results, -1), ray_tasks.stream

    def dying(function: Callable[[Any], Any], tasks: Iterable[Any], **options: int) -> Iterator[Any]:
        for result in stream(function, tasks, **options):
            if next(left) <= 0:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(ray_tasks, "stream", dying)


@pytest.mark.parametrize("results", [0, 5, 14], ids=["at once", "while it stages", "while it commits"])
def test_an_interrupted_run_continues_to_the_same_bytes(
    results: int,
    corpus: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted_after(results, patch)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(corpus), str(out), config())
    assert not (out / "manifest.json").exists() and not (out / "_lease.json").exists()
    (work,) = (out / "_work").iterdir()
    ledgers = {path: path.stat().st_mtime_ns for path in (work / "ledgers").glob("*/*")}
    assert len(ledgers) >= results or results == 14
    again: list[Path] = []

    def look(target: Folder, *arguments: Any) -> None:
        again.extend(path for path, written in ledgers.items() if path.stat().st_mtime_ns != written)
        publish(target, *arguments)

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.corpus.prepare.publish", look)
        patch.setattr("pipelines.corpus.prepare.log.info", lambda text, *values: said.append(text % values))
        prepare(str(corpus), str(out), config())
    assert again == [], "a piece with a ledger is not staged again"
    found = re.search(r"continuing: (\d+) of 14 pieces", " ".join(said))
    assert int(found[1] if found else 0) >= len(ledgers), "tasks that ran at the interruption may have ended since"
    assert content(out) == undisturbed
    assert verify(str(out)).faults == ()


def test_an_earlier_output_stays_readable_until_the_new_one_is_complete(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    old = write_corpus(tmp_path / "old", rows=8)
    prepare(str(old), str(out), config())
    before = content(out)
    with monkeypatch.context() as patch:
        interrupted_after(15, patch)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(corpus), str(out), config())
    during = content(out)
    assert {name: during[name] for name in before} == before and len(during) > len(before)
    prepare(str(corpus), str(out), config())
    assert not set(content(out)) & {name for name in before if "part-" in name}


def test_parts_are_cut_by_size_and_do_not_depend_on_the_order_of_results(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    monkeypatch.setattr(part_cuts, "_PART_ROWS", 10)
    monkeypatch.setattr(part_cuts, "_PART_BYTES", 700)
    prepare(str(corpus), str(tmp_path / "a"), config())
    stream = ray_tasks.stream
    monkeypatch.setattr(ray_tasks, "stream", lambda f, tasks, **o: reversed(list(stream(f, tasks, **o))))
    prepare(str(corpus), str(tmp_path / "b"), config())
    assert content(tmp_path / "a") == content(tmp_path / "b")
    names = [Path(name) for name in content(tmp_path / "a")]
    assert sum(name.parent.name == "images" for name in names) > 2
    assert sum(name.parent.name == "rows" for name in names) > 2
    assert verify(str(tmp_path / "a")).faults == ()


@pytest.mark.slow
def test_a_corpus_of_several_groups_has_the_rows_of_one_group(tmp_path: Path, local_ray: None) -> None:
    """300 pieces are two groups: ids, pictures and contents that repeat between them are found as within one."""
    corpus = write_corpus(tmp_path / "c", rows=600, images=7)
    found = []
    for rows in (2, 64):
        out = tmp_path / f"out-{rows}"
        settings = [f"prepare.rows_per_task={rows}", "prepare.exact_duplicates=drop"]
        manifest = prepare(str(corpus), str(out), load_config("micro", settings))
        tables = [
            pa.concat_tables([pq.read_table(out / name / part) for part in table_parts(Folder.at(out), name)])
            for name in ("rows", "rejected", "images")
        ]
        assert verify(str(out)).faults == ()
        columns = ("by_stage", "by_split_task", "rows_in", "rows_out", "filtered", "images")
        found.append(
            ([set(t["id"].to_pylist()) for t in tables], tables[0], [getattr(manifest, name) for name in columns])
        )
    (ids, kept, counts), (other_ids, other_kept, other_counts) = found
    assert ids == other_ids and kept.equals(other_kept) and counts == other_counts
    assert kept.num_rows < 600 and len(ids[2]) == 7


def test_rows_without_a_key_keep_their_ids_when_the_corpus_moves(tmp_path: Path, local_ray: None) -> None:
    """The plan is another one, since a place is part of it; the rows and pictures are the same."""
    found = []
    for place in ("here/c", "there/renamed"):
        corpus = write_corpus(tmp_path / place)
        lines: list[dict[str, Any]] = [{"query_images": [f"{i}.png"], "target_text": f"t{i}"} for i in range(5)]
        write_rows(corpus / "rows" / "c.jsonl", lines)
        manifest = prepare(str(corpus), str(tmp_path / place / "out"), config())
        (part,) = (tmp_path / place / "out" / "rows").iterdir()
        rows = [row for row in pq.read_table(part).to_pylist() if row["key"].startswith("@")]
        found.append((manifest.plan, [(row["id"], row["key"], row["query"], row["target"]) for row in rows]))
    (plan, ids), (other_plan, other_ids) = found
    assert len(ids) == 5 and ids == other_ids and plan != other_plan


def test_a_second_job_into_the_same_output_is_refused(corpus: Path, tmp_path: Path, local_ray: None) -> None:
    out = Folder.at(tmp_path / "out")
    out.claim(JobKind.PREPARE)
    with Lease.take(out, JobKind.PREPARE):
        with pytest.raises(ConfigError, match=rf"in use by crem prepare on host .*, process {os.getpid()}, since"):
            prepare(str(corpus), out.uri, config())
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["_crem.json", "_lease.json"]
    assert prepare(str(corpus), out.uri, config()).rows_in == 40


def command(corpus: str, out: str, *settings: str) -> list[str]:
    return [sys.executable, "-m", "crem.cli", "prepare", corpus, "--out", out, *SETTINGS, *settings]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, local_ray: None) -> None:
    corpus = write_corpus(tmp_path / "c", rows=600, images=200)
    prepare(str(corpus), str(tmp_path / "good"), config())
    moments, out = random.Random(7), tmp_path / "out"
    for _ in range(6):
        job = subprocess.Popen(command(str(corpus), str(out)), stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while job.poll() is None and not list(out.glob("_work/*/ledgers/*/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 3))
        os.killpg(job.pid, signal.SIGKILL)  # driver, raylet and workers
        job.wait()
    done = subprocess.run(command(str(corpus), str(out)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(out) == content(tmp_path / "good")


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_a_piece(tmp_path: Path, local_ray: None) -> None:
    corpus = write_corpus(tmp_path / "c", rows=600, images=200)
    prepare(str(corpus), str(tmp_path / "good"), config())
    out = tmp_path / "out"
    job = subprocess.Popen(command(str(corpus), str(out)), stderr=subprocess.PIPE, text=True, start_new_session=True)
    killed, deadline = 0, time.monotonic() + 120
    while job.poll() is None and killed < 3 and time.monotonic() < deadline:
        if len(list(out.glob("_work/*/ledgers/*/*"))) > 5 * (killed + 1):
            found = subprocess.run(["pgrep", "-g", str(job.pid), "-f", "ray::Map"], capture_output=True, text=True)
            for pid in found.stdout.split()[:1]:
                os.kill(int(pid), signal.SIGKILL)
                killed += 1
        time.sleep(0.05)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors[-2000:]
    assert content(out) == content(tmp_path / "good")


@pytest.mark.slow
def test_the_storage_is_away_for_a_while(tmp_path: Path, s3_env: S3Server, local_ray: None) -> None:
    """The server of corpus and output is killed while rows are staged, and started again 20 s later."""
    import s3fs

    corpus = write_corpus(tmp_path / "c", rows=600, images=200)
    fs = s3fs.S3FileSystem()
    fs.put(str(corpus), f"{s3_env.bucket}/away/c", recursive=True)
    place, out = f"s3://{s3_env.bucket}/away/c", f"s3://{s3_env.bucket}/away/out"
    job = subprocess.Popen(command(place, out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while job.poll() is None and time.monotonic() < deadline:
        if len(fs.glob(f"{s3_env.bucket}/away/out/_work/*/ledgers/*/*", refresh=True)) > 5:
            break
        time.sleep(0.2)
    s3_env.kill()
    threading.Timer(20.0, s3_env.start).start()
    printed, errors = job.communicate(timeout=400)
    assert job.returncode == 0, errors[-2000:]
    manifest = PrepareManifest.read(Folder.at(out))
    assert manifest is not None and manifest.rows_in == 600
    missing = sum(i % 201 == 200 for i in range(600))
    assert manifest.by_reason == {"duplicate_id": 3, "image_missing": missing}, printed


@pytest.mark.slow
def test_storage_that_stays_away_ends_the_job_in_one_line_and_it_continues(tmp_path: Path, s3_env: S3Server) -> None:
    corpus = write_corpus(tmp_path / "c", rows=600, images=200)
    out = f"s3://{s3_env.bucket}/gone/out"
    job = subprocess.Popen(command(str(corpus), out, "prepare.storage_patience_s=3"), stderr=subprocess.PIPE, text=True)
    import s3fs

    fs, deadline = s3fs.S3FileSystem(), time.monotonic() + 120
    while job.poll() is None and time.monotonic() < deadline:
        if len(fs.glob(f"{s3_env.bucket}/gone/out/_work/*/ledgers/*/*", refresh=True)) > 5:
            break
        time.sleep(0.2)
    s3_env.kill()
    _, errors = job.communicate(timeout=300)
    s3_env.start()
    last = errors.strip().splitlines()[-1]
    assert job.returncode == 1 and "run the same command again: it continues" in last, errors[-2000:]
    assert "Traceback" not in errors and StorageError.__name__ not in last
    done = subprocess.run(command(str(corpus), out), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "continuing: " in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_a_wrong_secret_and_a_missing_bucket_are_said_at_once(
    tmp_path: Path, s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "c", rows=8)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    began = time.monotonic()
    done = subprocess.run(command(str(corpus), f"s3://{s3_env.bucket}/x"), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "AWS_SECRET_ACCESS_KEY" in done.stderr.splitlines()[-1], done.stderr[-2000:]
    assert time.monotonic() - began < 60
