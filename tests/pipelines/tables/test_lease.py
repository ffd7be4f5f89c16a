"""The lease of an output folder: one holder at a time, on a local disk and on a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from crem.errors import ConfigError, ResourceError
from pipelines.tables.lease import LEASE, Lease
from pipelines.tables.storage import Folder, JobKind


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        (tmp_path / "out").mkdir()
        return Folder.at(tmp_path / "out")
    server = request.getfixturevalue("s3_env")
    return Folder.at(f"s3://{server.bucket}/lease/{tmp_path.name}")


def test_one_of_many_that_start_at_once_gets_it_and_gives_it_back(place: Folder) -> None:
    def take(_: int) -> Lease | ConfigError:
        try:
            return Lease.take(place, JobKind.PREPARE)
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(6) as threads:
        got = list(threads.map(take, range(6)))
    (lease,) = [one for one in got if isinstance(one, Lease)]
    refusals = [str(one) for one in got if isinstance(one, ConfigError)]
    assert len(refusals) == 5
    assert all(f"in use by crem prepare on host {os.uname().nodename}, process {os.getpid()}" in r for r in refusals)
    assert all("last heartbeat" in r for r in refusals)
    lease.release()
    assert not place.exists(LEASE)
    with Lease.take(place, JobKind.PREPARE) as again:
        again.check()


def test_it_is_renewed_and_a_holder_who_lost_it_may_not_commit(place: Folder) -> None:
    with Lease.take(place, JobKind.PREPARE, heartbeat_s=0.05) as lease:
        first = renewed = place.read_json(LEASE)
        deadline = time.monotonic() + 20
        while renewed == first and time.monotonic() < deadline:
            renewed = place.read_json(LEASE)
        assert first and renewed and renewed["heartbeat"] > first["heartbeat"] and renewed["token"] == first["token"]
        lease.check()
        other = {**renewed, "token": "another", "host": "elsewhere"}
        while lease._thread.is_alive() and time.monotonic() < deadline:  # a heartbeat in flight may write over it
            place.write_json(other, LEASE)
            lease._thread.join(0.5)
        with pytest.raises(ResourceError, match="taken over by crem prepare on host elsewhere"):
            lease.check()
    assert (place.read_json(LEASE) or {})["token"] == "another", "a lease of another is not removed"


def test_a_killed_process_of_this_machine_is_succeeded_at_once(place: Folder) -> None:
    program = (
        "import os, sys; from pipelines.tables.lease import Lease; from pipelines.tables.storage import *;"
        "Lease.take(Folder(sys.argv[1]), JobKind.PREPARE); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, place.uri], timeout=60).returncode == 9
    assert place.exists(LEASE)
    began = time.monotonic()
    with Lease.take(place, JobKind.PREPARE):
        assert time.monotonic() - began < 5


def test_a_silent_holder_elsewhere_is_succeeded_only_after_the_stated_time(place: Folder) -> None:
    lease = Lease.take(place, JobKind.PREPARE)
    lease.release()
    now = time.time()
    held = {"token": "t", "kind": "prepare", "host": "elsewhere", "pid": 1, "process": "", "since": now - 900}
    place.write_json({**held, "heartbeat": now - 50}, LEASE)
    with pytest.raises(ConfigError, match=r"host elsewhere, process 1.*heartbeat 50 s ago.*120 s after its last"):
        Lease.take(place, JobKind.PREPARE)
    with Lease.take(place, JobKind.PREPARE, expiry_s=40, heartbeat_s=0.1) as taken:
        taken.check()
    place.write_json({**held, "heartbeat": now - 50}, LEASE)
    with ThreadPoolExecutor(1) as threads:  # its clock is slow: it is seen to be alive while it is watched
        taking = threads.submit(Lease.take, place, JobKind.PREPARE, expiry_s=40, heartbeat_s=0.5)
        time.sleep(0.7)
        place.write_json({**held, "heartbeat": now - 49}, LEASE)
        with pytest.raises(ConfigError, match="in use by"):
            taking.result()


def test_the_content_names_the_holder(place: Folder) -> None:
    with Lease.take(place, JobKind.PREPARE):
        content: dict[str, Any] = json.loads(place.read_bytes(LEASE))
    assert (content["kind"], content["pid"], content["host"]) == ("prepare", os.getpid(), os.uname().nodename)
