"""Of several writers of one new file exactly one succeeds, on a local disk and on S3."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.tables import conditional_write
from pipelines.tables.conditional_write import write_new
from pipelines.tables.storage import Folder
from tests.s3_server import S3Server

WRITERS = 8


def contest(folder: Folder) -> None:
    for turn in range(5):
        data = [f"writer {number} of turn {turn}".encode() * 1000 for number in range(WRITERS)]
        with ThreadPoolExecutor(WRITERS) as pool:
            won = list(pool.map(lambda mine, turn=turn: write_new(folder, mine, "ledger", f"{turn}.json"), data))
        assert sum(won) == 1
        assert folder.read_bytes("ledger", f"{turn}.json") == data[won.index(True)]
        assert not write_new(folder, b"late", "ledger", f"{turn}.json")
        assert write_new(folder, data[won.index(True)], "ledger", f"{turn}.json"), "an answer that was lost"


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_one_writer_wins_on_a_local_disk(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(conditional_write.os, "link", refuse)
        assert write_new(Folder.at(tmp_path), b"data", "a") and not write_new(Folder.at(tmp_path), b"other", "a")
    else:
        contest(Folder.at(tmp_path))
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_one_writer_wins_on_s3(s3_env: S3Server) -> None:
    contest(Folder.at(f"s3://{s3_env.bucket}/contest").patient(10))
