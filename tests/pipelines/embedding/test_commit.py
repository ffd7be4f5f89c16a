"""A job that is stopped while it commits, and woken when another has taken its output over, changes nothing there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.embedding.output import PROGRESS, read_ledgers
from pipelines.embedding.verify_embeddings import verify_embeddings
from pipelines.tables.lease import LEASE
from pipelines.tables.storage import Folder
from tests.pipelines.conftest import table, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STOPPING = """
import os, sys, time
from pathlib import Path
from crem.cli import main
from pipelines.embedding import embed_run

commit, folder = embed_run.commit_shard, Path(sys.argv.pop(1))

def commit_shard(shard, pieces, **options):
    from pipelines.embedding import shard_commit

    create = shard_commit.create_ledger

    def waiting(target, ledger):
        (folder / "at the ledger").touch()
        while not (folder / "go on").exists():
            time.sleep(0.1)
        won = create(target, ledger)
        (folder / ("won" if won else "lost")).touch()
        return won

    shard_commit.create_ledger = waiting
    return commit(shard, pieces, **options)

embed_run.commit_shard = commit_shard
raise SystemExit(main(sys.argv[1:]))
"""


def wait_for(what: Callable[[], bool], job: subprocess.Popen[str], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert job.poll() is None, job.communicate()[0][-2000:]
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.1)


def content(out: Path) -> dict[Path, bytes]:
    """All files but the log of progress."""
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != PROGRESS}


def test_a_job_that_wakes_up_after_it_was_taken_over_overwrites_nothing(tmp_path: Path, tiny_model_dir: str) -> None:
    write_rows(tmp_path / "items.jsonl", [{"id": i, "text": f"item {i}"} for i in range(100)])
    out, marks = tmp_path / "out", tmp_path / "marks"
    marks.mkdir()
    words = ["embed", str(tmp_path / "items.jsonl"), "--model", tiny_model_dir, "--out", str(out)]
    stopped = subprocess.Popen(
        [sys.executable, "-c", STOPPING, str(marks), *words],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for((marks / "at the ledger").exists, stopped)
        assert len(list(out.glob("rows/part-*"))) == 1 and not list(out.glob("ledger/*"))
        os.killpg(stopped.pid, signal.SIGSTOP)
        lease = json.loads((out / LEASE).read_text())
        lease["heartbeat"] -= 1000  # as if it had been stopped for so long
        (out / LEASE).write_text(json.dumps(lease))
        done = subprocess.run([sys.executable, "-m", "crem.cli", *words], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0 and "taking over from crem embed" in done.stderr, done.stderr[-2000:]
        before = content(out)
        assert len(table(out)) == 100
        (marks / "go on").touch()
        os.killpg(stopped.pid, signal.SIGCONT)
        said, _ = stopped.communicate(timeout=200)
        assert stopped.returncode != 0 and "was taken over by" in said, said[-2000:]
        assert (marks / "lost").exists() and not (marks / "won").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(stopped.pid, signal.SIGKILL)
    assert content(out) == before
    assert not verify_embeddings(str(out)).faults and len(read_ledgers(Folder.at(out))) == 1
