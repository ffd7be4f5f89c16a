"""Folders of results: what is never made, and what a refused look at them says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import s3fs
from aiobotocore.client import AioBaseClient
from botocore.exceptions import ClientError

from crem.doctor import examine
from crem.errors import ConfigError
from pipelines.tables.storage import Folder, JobKind


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Buckets that the server was asked to make.

    SeaweedFS makes a bucket by itself on the first PUT into it. Amazon's S3 does not; it answers as here.
    """
    asked: list[str] = []
    call = AioBaseClient._make_api_call

    async def watched(self: AioBaseClient, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "CreateBucket":
            asked.append(arguments["Bucket"])
        elif operation in ("PutObject", "CreateMultipartUpload") and arguments["Bucket"] == "no-such-bucket":
            answer = {"Code": "NoSuchBucket", "Message": "The specified bucket does not exist"}
            raise ClientError({"Error": answer}, operation)
        return await call(self, operation, arguments)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", watched)
    return asked


def test_a_missing_bucket_is_not_made(s3_env: Any, made: list[str]) -> None:
    folder = Folder.at("s3://no-such-bucket/out")
    with pytest.raises(FileNotFoundError):
        folder.write_bytes(b"x", "deep", "file")
    with pytest.raises(FileNotFoundError), folder.open("deep", "file", mode="wb") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match=r"s3://no-such-bucket/out cannot be written.*AWS_ENDPOINT_URL"):
        folder.claim(JobKind.PREPARE)
    report = examine(["s3://no-such-bucket/out"])
    assert any("s3://no-such-bucket/out cannot be used" in problem for problem in report.problems)
    assert made == []
    assert "no-such-bucket" not in s3fs.S3FileSystem(use_listings_cache=False).ls("")


def test_a_bucket_that_is_there_needs_no_folders(s3_env: Any, made: list[str]) -> None:
    place = f"s3://{s3_env.bucket}/storage/out"
    folder = Folder.at(place)
    folder.write_json({"a": 1}, "deep", "file.json")
    folder.move("deep/file.json", "other/file.json")
    assert folder.read_json("other", "file.json") == {"a": 1} and not folder.exists("deep", "file.json")
    assert not any(place in problem for problem in examine([place]).problems)
    assert made == []


def test_refused_credentials_name_the_variables(s3_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Folder.at(f"s3://{s3_env.bucket}/storage").write_json({}, "there.json")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    says = rf"s3://{s3_env.bucket}/storage may not be read.*AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    folder = Folder.at(f"s3://{s3_env.bucket}/storage")
    for look in (folder.read_json, folder.exists):
        with pytest.raises(ConfigError, match=says):
            look("there.json")


def test_missing_credentials_name_the_variables(s3_env: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.fspath(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID"):
        Folder.at(f"s3://{s3_env.bucket}/storage").read_json("there.json")


def test_folders_here_are_made_by_path_and_by_uri(tmp_path: Path) -> None:
    for place in (f"{tmp_path}/path", f"file://{tmp_path}/uri"):
        folder = Folder.at(place)
        folder.write_bytes(b"x", "deep", "file")
        with folder.open("other", "file", mode="wb") as file:
            file.write(b"y")
        folder.move("deep/file", "moved/file")
        assert folder.fs.cat_file(folder.path("moved", "file")) == b"x" and folder.exists("other", "file")
        assert not any(place in problem for problem in examine([f"{place}/new"]).problems)


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_folder_of_many_files_is_listed_whole(tmp_path: Path, store: str, request: pytest.FixtureRequest) -> None:
    """More than a page of S3, which is 1,000 keys."""
    folder = Folder.at(tmp_path / "many")
    names = [f"{number:04d}.x" for number in range(1005)]
    for name in names:
        folder.write_bytes(name.encode(), name)
    folder.write_bytes(b"abc", "inner", "deep", "file")
    if store == "s3":
        bucket = request.getfixturevalue("s3_env").bucket
        s3fs.S3FileSystem().put(f"{tmp_path}/many/", f"{bucket}/many/", recursive=True)
        folder = Folder.at(f"s3://{bucket}/many")
    assert folder.files(".x") == names and folder.sizes() == dict.fromkeys(names, 6)
    assert folder.folders() == ["inner"] and folder.child("inner").folders() == ["deep"]
    assert folder.child("inner").child("deep").sizes() == {"file": 3}
    assert folder.child("nowhere").sizes() == {} and folder.child("0000.x").files() == []


@pytest.mark.parametrize("place", ["", "  "])
def test_an_empty_name_of_a_folder_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=r"is empty; give a path or a URI, or '\.'"):
        Folder.at(place)
