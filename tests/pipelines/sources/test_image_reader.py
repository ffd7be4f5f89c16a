"""Where the images of a corpus are, and what a failure of their storage does."""

from __future__ import annotations

import io
import threading
import time

import pytest
import s3fs
from PIL import Image

from crem.config import ImageConfig
from crem.errors import ItemError, StorageError
from pipelines.sources.image_reader import ImageReader
from pipelines.tables.storage import Folder
from tests.s3_server import S3Server

LIMITS = ImageConfig()


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), shade).save(out, "PNG")
    return out.getvalue()


def write(folder: Folder, files: dict[str, bytes]) -> Folder:
    for name, data in files.items():
        folder.write_bytes(data, *name.split("/"))
    return folder


def reason(reader: ImageReader, name: str) -> str:
    with pytest.raises(ItemError) as error:
        reader.read(name)
    assert len(error.value.detail) <= 300
    return error.value.reason


def test_an_object_store_that_is_away_for_a_while_rejects_nothing(s3_env: S3Server) -> None:
    root = write(Folder(f"s3://{s3_env.bucket}/away"), {f"images/{i}.png": png(i) for i in range(40)})
    root.write_bytes(b"", "images", "empty.png")
    reader = ImageReader.of(root, LIMITS)
    assert reader.read("0.png") == png(0)

    def outage() -> None:
        s3_env.kill()
        time.sleep(8)
        s3_env.start()

    away = threading.Thread(target=outage)
    read = []
    for i in range(40):
        if i == 10:
            away.start()
            time.sleep(0.3)
        read.append(reader.read(f"{i}.png"))
    away.join()
    assert read == [png(i) for i in range(40)]
    assert reason(reader, "none.png") == "image_missing"
    assert reason(reader, f"s3://{s3_env.bucket}/away/none.png") == "image_missing"
    assert reason(reader, "empty.png") == "image_corrupt"


def test_an_object_store_that_stays_away_ends_the_job_in_bounded_time(s3_env: S3Server) -> None:
    root = write(Folder(f"s3://{s3_env.bucket}/gone"), {"images/a.png": png(1)})
    reader = ImageReader.of(root, LIMITS)
    reader.timeout_s = 5
    s3_env.kill()
    try:
        began = time.monotonic()
        with pytest.raises(StorageError, match="run again once its storage answers"):
            reader.read("a.png")
        assert time.monotonic() - began < 60
    finally:
        s3_env.start()
    assert reader.read("a.png") == png(1)


def test_a_missing_bucket_and_a_wrong_secret_are_not_missing_images(
    s3_env: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(Folder(f"s3://{s3_env.bucket}/secret"), {"images/a.png": png(1)})
    reader = ImageReader.of(root, LIMITS)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"the bucket of .* does not exist"):
        ImageReader("s3://no-such-bucket/c", None, "s3://no-such-bucket/c/images", LIMITS).read("a.png")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY"):
        reader.read("a.png")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY"):
        reader.read("none.png")
    assert time.monotonic() - began < 20, "waiting would change nothing"
