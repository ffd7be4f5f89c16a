"""Storage that fails is waited for and is never taken for a damaged file; rows are neither lost nor given twice."""

from __future__ import annotations

import errno
import gzip
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from crem.errors import ConfigError, StorageError
from pipelines.sources import input_file, sources
from pipelines.tables import storage_retry
from tests.pipelines.sources.written import ranges_of, records_of, tar, write
from tests.s3_server import S3Server

ROWS = [{"a": f"{i:05}", "b": "x" * 2000} for i in range(3000)]


def _files() -> dict[str, bytes]:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), parquet, row_group_size=1000, compression="none", use_dictionary=False)
    return {
        "a.jsonl": lines, "a.jsonl.gz": gzip.compress(lines, 1), "a.parquet": parquet.getvalue(),
        "a.json": json.dumps(ROWS).encode(),
        "a.csv": b"a,b\n" + b"".join(f"{r['a']},{r['b']}\n".encode() for r in ROWS),
        "a.tar": tar([(f"{r['a']}.txt", r["b"].encode()) for r in ROWS]),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.json", "a.csv", "a.tar"])
def test_a_read_that_fails_goes_on_at_the_same_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place = write(tmp_path, {name: _files()[name]})
    good = records_of(place, 500)
    fetch, calls = input_file._Bytes._fetch, 0

    def failing(self: Any, start: int, count: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise OSError(errno.ECONNRESET, "Connection reset by peer")
        return fetch(self, start, count)

    monkeypatch.setattr(input_file._Bytes, "_fetch", failing)
    monkeypatch.setattr(storage_retry.time, "sleep", lambda _: None)
    assert records_of(place, 500) == good and len(good) == 3000 and calls >= 6
    monkeypatch.setattr(input_file._Bytes, "_fetch", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone away")))
    monkeypatch.setattr(input_file, "TIMEOUT_S", 0.0)
    monkeypatch.setattr(input_file.storage_call, "__kwdefaults__", {"timeout_s": 0.0})
    with pytest.raises(StorageError, match=rf"{name}.*the storage did not answer"):
        records_of(place, 500)


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_costs_no_row(s3_env: S3Server) -> None:
    place = f"s3://{s3_env.bucket}/outage"
    for name, data in _files().items():
        s3fs.S3FileSystem().pipe_file(f"{place[5:]}/{name}/{name}", data)
    for name in ("a.jsonl", "a.tar", "a.parquet"):
        [part, *rest] = ranges_of(f"{place}/{name}", 1000)
        reading = sources.read(part)
        read = [next(reading).record]
        s3_env.kill()
        back = threading.Thread(target=lambda: (time.sleep(3), s3_env.start()))
        back.start()
        try:
            read += [row.record for row in reading]
            read += [row.record for part in rest for row in sources.read(part)]
        finally:
            back.join()
        values = [(r["__key__"] if name == "a.tar" else r["a"]) for r in read if r]
        assert values == [r["a"] for r in ROWS], name


def test_wrong_secrets_and_missing_buckets_are_said_at_once(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="does not exist"):
        sources.find("s3://no-such-bucket-here/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY"):
        sources.find(f"s3://{s3_env.bucket}/outage")
    assert time.monotonic() - began < 20
