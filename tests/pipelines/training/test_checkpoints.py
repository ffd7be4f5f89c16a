"""Checkpoints in storage, without a run: incomplete ones do not count, old ones go, failing storage is survived."""

from __future__ import annotations

import logging
import threading
import time
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import pytest
import s3fs

from crem.train.state import FileRecord, RankManifest, read_manifests, verify
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import retry_storage
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.restore import LocalCheckpoint, RankPlace, fetch_newest
from pipelines.training.uploads import Uploads
from pipelines.training.workspace import is_node_leader


def part(folder: Path, step: int, rank: int = 0, ranks: int = 1, stage: int = 0) -> Path:
    """What one rank writes locally: a file of its own and its manifest."""
    name = f"state/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    data = f"{step} of {rank}".encode() * 100
    (folder / "state").mkdir(parents=True)
    (folder / name).write_bytes(data)
    record = FileRecord(len(data), sha256(data).hexdigest())
    manifest = RankManifest(step, ranks, rank, stage, "run", {name: record})
    (folder / manifest.name).write_text(manifest.to_json())
    return folder


def stored(tmp_path: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(Folder.at(tmp_path / "checkpoints"))
    for step in steps:
        checkpoints.write(f"step-{step:08d}-a", part(tmp_path / f"local-{step}", step))
    return checkpoints


def newest(checkpoints: Checkpoints, workspace: Path) -> LocalCheckpoint | None:
    place = RankPlace(rank=0, ranks=1, is_node_leader=True, workspace=workspace)
    return fetch_newest(checkpoints, place, from_rank_zero=lambda name: name, any_rank=lambda problem: problem)


def test_a_checkpoint_is_complete_when_every_rank_has_written_its_manifest(tmp_path: Path) -> None:
    checkpoints = stored(tmp_path)
    assert checkpoints.complete() == []
    checkpoints.write("step-00000003-a", part(tmp_path / "0", 3, 0, 2))
    assert checkpoints.complete() == []
    checkpoints.write("step-00000003-b", part(tmp_path / "1", 3, 1, 2))  # of another attempt
    assert checkpoints.complete() == []
    checkpoints.write("step-00000003-a", part(tmp_path / "2", 3, 1, 2))
    assert [(f.name, f.step) for f in checkpoints.complete()] == [("step-00000003-a", 3)]


def test_the_manifest_is_written_last(tmp_path: Path) -> None:
    order = []

    class Watched(Folder):
        def upload(self, local: str, *parts: str) -> None:
            order.append(parts[-1])
            super().upload(local, *parts)

    Checkpoints(Watched(str(tmp_path / "out"))).write("step-00000001-a", part(tmp_path / "local", 1))
    assert len(order) == 2 and order[-1] == "rank-0.json"


def test_old_and_abandoned_checkpoints_go(tmp_path: Path) -> None:
    checkpoints = stored(tmp_path, 1, 2, 3, 4)
    checkpoints.write("step-00000005-a", part(tmp_path / "half", 5, 0, 2))  # being written
    checkpoints.write("step-00000006-z", part(tmp_path / "dead", 6, 0, 2))  # of an attempt that died
    checkpoints.tidy(keep=2, attempt="a", pinned=["step-00000001-a"])
    assert checkpoints.folder.folders() == [f"step-0000000{n}-a" for n in (1, 3, 4, 5)]


@pytest.mark.parametrize("damaged", [1, 2, 3])
def test_damaged_checkpoints_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: int
) -> None:
    checkpoints = stored(tmp_path, 1, 2, 3)
    for step in range(3, 3 - damaged, -1):
        file = next((tmp_path / "checkpoints" / f"step-0000000{step}-a" / "state").iterdir())
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    with caplog.at_level(logging.WARNING):
        found = newest(checkpoints, tmp_path / "place")
    assert (found and found.step) == (3 - damaged or None)
    named = [record.message for record in caplog.records if "damaged" in record.message]
    assert len(named) == damaged and "step-00000003-a" in named[0] and "optim_states.pt" in named[0]
    assert ("starts again from step 0" in caplog.text) == (damaged == 3)
    caplog.clear()
    newest(checkpoints, tmp_path / "again")
    assert "damaged" not in caplog.text, "it is not read again"


def test_one_process_of_a_node_is_its_leader(tmp_path: Path) -> None:
    assert [is_node_leader(tmp_path) for _ in range(3)] == [True, False, False]


class Failing(Folder):
    """Storage that refuses uploads until ``answers`` is set."""

    def upload(self, local: str, *parts: str) -> None:
        tries.append(parts[0])
        if not answers.is_set():
            raise OSError("no route to storage")
        super().upload(local, *parts)


tries: list[str] = []
answers = threading.Event()


def uploading(tmp_path: Path) -> tuple[Uploads, Checkpoints, list[str]]:
    tries.clear()
    answers.clear()
    warnings: list[str] = []
    checkpoints = Checkpoints(Failing(str(tmp_path / "checkpoints")))
    return Uploads(checkpoints, rank=0, attempt="a", keep=1, warn=warnings.append), checkpoints, warnings


def test_an_upload_that_fails_is_tried_again(tmp_path: Path) -> None:
    uploads, checkpoints, warnings = uploading(tmp_path)
    uploads.start(part(tmp_path / "local", 1), 1)
    threading.Timer(0.5, answers.set).start()
    uploads.finish()
    assert [f.step for f in checkpoints.complete()] == [1]
    assert len(warnings) == 2 and "is not written" in warnings[0] and "after all" in warnings[1]
    assert not (tmp_path / "local").exists(), "the local copy is removed after the upload"


def test_a_failing_upload_gives_way_to_the_next_checkpoint(tmp_path: Path) -> None:
    uploads, checkpoints, warnings = uploading(tmp_path)
    uploads.start(part(tmp_path / "one", 1), 1)
    uploads.make_room()
    assert "NO checkpoint of step 1" in warnings[-1] and not (tmp_path / "one").exists()
    answers.set()
    uploads.start(part(tmp_path / "two", 2), 2)
    uploads.finish()
    assert [f.step for f in checkpoints.complete()] == [2]
    assert checkpoints.folder.folders() == ["step-00000002-a"], "the incomplete one is gone"


def test_the_end_of_a_run_does_not_wait_forever(tmp_path: Path) -> None:
    uploads, checkpoints, warnings = uploading(tmp_path)
    uploads.start(part(tmp_path / "one", 1), 1)
    uploads.finish(timeout_s=0.1)
    assert checkpoints.complete() == [] and "NO checkpoint of step 1" in warnings[-1]


def test_an_s3_server_that_dies_during_an_upload(tmp_path: Path, s3_server: Any, s3_env: Any) -> None:
    """Its part of the checkpoint does not count; when it is back the upload succeeds, and all of it arrives."""
    checkpoints = Checkpoints(Folder.at(f"s3://{s3_server.bucket}/dies/checkpoints"))
    warnings: list[str] = []
    uploads = Uploads(checkpoints, rank=0, attempt="a", keep=1, warn=warnings.append)
    local = part(tmp_path / "local", 7)
    large = local / "state" / "large"
    with large.open("wb") as file:
        for number in range(200):
            file.write(bytes([number]) * 2**20)
    with large.open("rb") as file:
        record = FileRecord(large.stat().st_size, file_digest(file, "sha256").hexdigest())
    manifest = read_manifests(local)[0]
    manifest.files["state/large"] = record
    (local / manifest.name).write_text(manifest.to_json())
    uploads.start(local, 7)
    time.sleep(0.3)
    s3_server.kill()
    try:
        while not warnings:
            time.sleep(0.05)
    finally:
        s3_server.start()
    s3fs.S3FileSystem.clear_instance_cache()
    uploads.finish(timeout_s=120)
    assert "is not written" in warnings[0] and "after all" in warnings[-1]
    (found,) = checkpoints.complete()
    checkpoints.fetch(found, list(manifest.files), tmp_path / "fetched")
    assert verify(tmp_path / "fetched").step == 7


def test_retries_end_and_are_only_for_storage() -> None:
    calls = []

    def refused() -> None:
        calls.append(1)
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError):
        retry_storage("x", refused, timeout_s=1.5)
    assert len(calls) == 2
    with pytest.raises(FileNotFoundError):
        retry_storage("x", lambda: Folder.at("/nowhere").open("a"))
