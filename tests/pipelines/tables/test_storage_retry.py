"""Which failures of storage are waited for, on real errors of a real server; and that waiting ends."""

from __future__ import annotations

import errno
import gzip
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import s3fs
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ParamValidationError
from s3fs.errors import translate_boto_error

from crem.errors import ConfigError, StorageError
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import StorageFault, require_storage, retry_storage, storage_fault
from tests.s3_server import S3Server


def answer(code: str, status: int) -> Exception:
    """What s3fs raises for an answer of a server."""
    response: Any = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(ClientError(response, "PutObject"))
    return error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (answer("InternalError", 500), "passing"),
        (answer("ServiceUnavailable", 503), "passing"),
        (answer("SlowDown", 503), "passing"),
        (answer("502", 502), "passing"),
        (answer("TooManyRequests", 429), "passing"),
        (answer("RequestTimeout", 400), "passing"),
        (answer("NoSuchUpload", 404), "passing"),
        (answer("NoSuchKey", 404), "absent"),
        (answer("NoSuchBucket", 404), "absent"),
        (answer("AccessDenied", 403), "denied"),
        (answer("SignatureDoesNotMatch", 403), "denied"),
        (answer("InvalidAccessKeyId", 403), "denied"),
        (answer("EntityTooLarge", 400), "lasting"),
        (answer("NotImplemented", 501), "lasting"),
        (EndpointConnectionError(endpoint_url="http://x"), "passing"),
        (NoCredentialsError(), "denied"),
        (ParamValidationError(report="x"), "lasting"),
        (ConnectionResetError("reset"), "passing"),
        (TimeoutError("slow"), "passing"),
        (OSError(errno.ESTALE, "stale handle"), "passing"),
        (OSError(errno.ENOSPC, "full"), "lasting"),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7"), "passing"),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation"), "denied"),
        (FileNotFoundError("a"), "absent"),
        (PermissionError("a"), "denied"),
        (IsADirectoryError(errno.EISDIR, "a"), "lasting"),
        (gzip.BadGzipFile("not a gzip file"), "lasting"),
        (pa.ArrowInvalid("not Parquet"), "lasting"),
        (ConfigError("for the user"), "lasting"),
        (KeyError("a bug"), "lasting"),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, Exception) else value,
)
def test_what_a_failure_means(error: Exception, fault: str) -> None:
    assert storage_fault(error) is StorageFault(fault)


def failing(*errors: Exception) -> tuple[Callable[[], str], list[Exception]]:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call, left


def test_only_what_passes_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    call, _ = failing(answer("InternalError", 500), ConnectionRefusedError("refused"), answer("SlowDown", 503))
    assert retry_storage("x", call) == "done"
    assert slept == [1.0, 2.0, 4.0]
    for lasting in (FileNotFoundError("gone"), KeyError("bug")):
        call, left = failing(lasting, ConnectionError("never reached"))
        with pytest.raises(type(lasting)):
            require_storage("x", call)
        assert len(left) == 1
    call, _ = failing(answer("AccessDenied", 403))
    with pytest.raises(ConfigError, match=r"reading x: access is denied.*AWS_ACCESS_KEY_ID"):
        require_storage("reading x", call)
    call, _ = failing(*[ConnectionRefusedError("refused\nby peer")] * 2)
    with pytest.raises(StorageError, match=r"writing y: .* did not answer for 0 s: .*refused by peer; .*continues"):
        require_storage("writing y", call, timeout_s=1.5)


def test_a_restart_of_the_server_is_waited_for_and_its_absence_is_one_line(
    s3_env: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder.at(f"s3://{s3_env.bucket}/retry").patient(60)
    folder.write_bytes(b"old", "a")
    s3_env.kill()
    try:
        impatient = Folder.at(folder.uri).patient(0.5)
        with pytest.raises(StorageError, match=r"reading s3://crem/retry/a: the storage did not answer.*run the same"):
            impatient.read_bytes("a")
        threading.Timer(4.0, s3_env.start).start()

        def stream(file: Any) -> int:
            for _ in range(3):
                file.write(b"x" * 100)
            return 300

        assert folder.write_stream(stream, "b") == 300
    finally:
        if s3_env._process is None:
            s3_env.start()
    assert folder.read_bytes("a") == b"old" and folder.read_bytes("b") == b"x" * 300
    assert "trying again" in caplog.text
    assert folder.sizes() == {"a": 3, "b": 300}


def test_a_stream_that_fails_in_the_middle_leaves_nothing(s3_env: S3Server, tmp_path: Path) -> None:
    for folder in (Folder.at(tmp_path), Folder.at(f"s3://{s3_env.bucket}/half"), Folder.at(f"file://{tmp_path}/uri")):

        def half(file: Any) -> None:
            file.write(b"x" * 6 * 2**20)
            raise KeyError("in the middle")

        with pytest.raises(KeyError):
            folder.write_stream(half, "a")
        assert folder.files() == []
        folder.write_stream(lambda file: file.write(b"whole"), "a")
        assert folder.read_bytes("a") == b"whole"
    assert s3fs.S3FileSystem(use_listings_cache=False).ls(f"{s3_env.bucket}/half") == [f"{s3_env.bucket}/half/a"]
    assert io.BytesIO(Folder.at(tmp_path).read_bytes("a")).read() == b"whole"
