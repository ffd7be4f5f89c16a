"""The S3 server that other tests rely on: both clients of the product read and write it, and it guards its data."""

from __future__ import annotations

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest
import s3fs
from botocore.exceptions import EndpointConnectionError

from tests.s3_server import S3Server


def test_both_clients_find_it_by_the_environment_and_see_each_others_objects(s3_env: S3Server) -> None:
    base = f"{s3_env.bucket}/parity"
    table = pa.table({"id": list(range(1000))})
    filesystem, path = fsspec.core.url_to_fs(f"s3://{base}/by-fsspec.parquet")
    with filesystem.open(path, "wb") as file:
        pyarrow.parquet.write_table(table, file)
    # pyarrow reads AWS_ENDPOINT_URL when it is given a URI, and not in S3FileSystem().
    arrow, _ = pyarrow.fs.FileSystem.from_uri(f"s3://{base}")
    pyarrow.parquet.write_table(table.slice(10), f"{base}/by-arrow.parquet", filesystem=arrow)

    assert pyarrow.parquet.read_table(f"{base}/by-fsspec.parquet", filesystem=arrow).equals(table)
    filesystem.invalidate_cache()
    assert sorted(filesystem.ls(f"s3://{base}")) == [f"{base}/by-arrow.parquet", f"{base}/by-fsspec.parquet"]
    with filesystem.open(f"s3://{base}/by-arrow.parquet") as file:
        assert pyarrow.parquet.read_table(file).equals(table.slice(10))


def test_multipart_uploads_and_ranged_reads(s3_env: S3Server) -> None:
    filesystem = s3fs.S3FileSystem()
    body = bytes(range(256)) * (12 << 12)  # 12 MiB: more than one part
    with filesystem.open(f"{s3_env.bucket}/parts", "wb", block_size=5 << 20) as file:
        file.write(body)
    assert filesystem.info(f"{s3_env.bucket}/parts")["size"] == len(body)
    assert filesystem.cat_file(f"{s3_env.bucket}/parts", start=6_000_001, end=6_000_101) == body[6_000_001:6_000_101]


def test_a_wrong_secret_is_rejected(s3_env: S3Server) -> None:
    filesystem = s3fs.S3FileSystem(key=s3_env.access_key, secret="wrong", use_listings_cache=False)
    with pytest.raises(PermissionError):
        filesystem.pipe_file(f"{s3_env.bucket}/intruder", b"x")
    arrow = pyarrow.fs.S3FileSystem(endpoint_override=s3_env.endpoint, access_key=s3_env.access_key, secret_key="wrong")
    with pytest.raises(OSError, match="SIGNATURE_DOES_NOT_MATCH"):
        arrow.get_file_info(pyarrow.fs.FileSelector(s3_env.bucket))
    assert not s3fs.S3FileSystem().exists(f"{s3_env.bucket}/intruder")


def test_objects_survive_a_crash(s3_env: S3Server) -> None:
    filesystem = s3fs.S3FileSystem(use_listings_cache=False)
    filesystem.pipe_file(f"{s3_env.bucket}/kept", b"before the crash")
    s3_env.kill()
    with pytest.raises(EndpointConnectionError):
        s3fs.S3FileSystem(config_kwargs={"retries": {"total_max_attempts": 1}, "connect_timeout": 2}).cat_file(
            f"{s3_env.bucket}/kept"
        )
    s3_env.restart()
    assert filesystem.cat_file(f"{s3_env.bucket}/kept") == b"before the crash"
