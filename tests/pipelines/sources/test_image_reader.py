"""Where the images of a corpus are, and what a failure of their storage does."""

from __future__ import annotations

import base64
import io
import os
import pickle
import shutil
import threading
import time
import unicodedata
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import s3fs
from PIL import Image

from crem.config import ImageAccess, ImageConfig
from crem.errors import ConfigError, ItemError, StorageError
from pipelines.sources import sources
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


def zipped(files: dict[str, bytes], *, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def local(tmp_path: Path, files: dict[str, bytes], access: ImageAccess | None = None) -> ImageReader:
    return pickle.loads(pickle.dumps(ImageReader.of(write(Folder(str(tmp_path / "corpus")), files), LIMITS, access)))


def test_names_are_sought_in_images_and_in_the_corpus_folder(tmp_path: Path) -> None:
    reader = local(
        tmp_path,
        {"images/1.png": png(1), "2.png": png(2), "images/both.png": png(3), "both.png": png(4), "train/5.png": png(5)},
    )
    assert reader.read("1.png") == reader.read("images/1.png") == reader.read("./images/1.png") == png(1)
    assert reader.read("2.png") == reader.read("./2.png") == png(2)
    assert reader.read("both.png") == png(3), "images/ comes first"
    assert reader.read("images/../both.png") == png(4)
    assert reader.read("images\\1.png") == png(1), "as Windows writes it"
    assert reader.read("5.png", near="train") == reader.read("train/5.png") == reader.read("train/5.png", near="x")
    assert reason(reader, "5.png") == "image_missing"
    assert reason(reader, "images") == "image_missing"
    with pytest.raises(ItemError, match=r"'n\.png' does not exist in the corpus folder, images/"):
        reader.read("n.png")


def test_an_archive_that_is_not_opened_is_named(tmp_path: Path) -> None:
    archive = zipped({"1.png": png(1)})
    rows = b'{"image": "1.png", "caption": "c"}\n'
    write(Folder(str(tmp_path)), {"A/images.zip": archive, "A/rows.jsonl": rows, "top.zip": archive})
    corpus = sources.find(str(tmp_path))
    reader = ImageReader.of(corpus.root, LIMITS, seen=corpus.archives)
    assert reader.read("1.png") == png(1)
    with pytest.raises(ItemError, match=r"image_missing.*other folders are not opened \(A/images\.zip\): unpack each"):
        reader.read("2.png")


def test_images_inside_the_row(tmp_path: Path) -> None:
    reader = local(tmp_path, {"images/a.png": png(1)})
    text = base64.b64encode(png(3)).decode()
    for source in (png(3), text, f"data:image/png;base64,{text}", text.rstrip("=") + "\n"):
        assert reader.read(source) == png(3)
    for other in (os.urandom(600), os.urandom(60_000)):
        with pytest.raises(ItemError, match=r"characters of base64") as error:
            reader.read(base64.b64encode(other).decode())
        assert error.value.reason == "image_corrupt" and len(error.value.detail) < 200


def test_a_name_that_starts_with_images_means_the_folder_of_the_corpus_first(tmp_path: Path) -> None:
    reader = local(tmp_path, {"images/a.png": png(1), "images/images/a.png": png(2), "images/images/b.png": png(3)})
    assert (reader.read("images/a.png"), reader.read("images/b.png")) == (png(1), png(3))


def test_names_meet_in_either_normal_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Zürich/crème é.png") for form in ("NFC", "NFD"))
    folders = local(tmp_path, {f"images/{decomposed}": png(1), "images/ö.png": png(2)})
    assert folders.read(composed) == folders.read(decomposed) == png(1)
    assert folders.read(unicodedata.normalize("NFD", "ö.png")) == png(2)
    shutil.rmtree(tmp_path / "corpus")
    archives = local(tmp_path, {"images.zip": zipped({decomposed: png(1), "ö.png": png(2)})})
    assert archives.read(composed) == archives.read(decomposed) == png(1)
    assert archives.read(unicodedata.normalize("NFD", "ö.png")) == png(2)


def test_nothing_outside_of_the_corpus_is_read(tmp_path: Path) -> None:
    """Each of these reads another person's file with the job's rights."""
    outside = tmp_path / "x.png"
    outside.write_bytes(png(9))
    (tmp_path / "corpus2").mkdir()
    (tmp_path / "corpus2" / "x.png").write_bytes(png(9))
    reader = local(tmp_path, {"images/a.png": png(1), "top.png": png(2)})
    corpus = tmp_path / "corpus"
    (corpus / "link.png").symlink_to(outside)
    (corpus / "images" / "folder").symlink_to(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.png", png(9))
    names = ["../x.png", "../../corpus2/x.png", "images/../../x.png", str(outside), f"file://{outside}"]
    names += [f"FILE://{outside}", f"local://{outside}", f"{corpus}/../x.png", f"file://{corpus}/../x.png"]
    names += [
        "link.png",
        "folder/x.png",
        "images/folder/x.png",
        f"{corpus}2/x.png",
        "/etc/hostname",
        "../corpus2/x.png",
    ]
    names += [f"zip://x.png::{tmp_path}/x.zip", f"zip://x.png::file://{tmp_path}/x.zip", "s3://other/x.png"]
    names += ["memory://x.png", "gs://b/x.png", f"zip://x.png::zip://a::{tmp_path}/x.zip", "..", "../"]
    for name in names:
        assert reason(reader, name) == "uri_refused", name
    assert reader.read("../top.png") == png(2), "from images/ this leads to the corpus folder"
    inside = [f"{corpus}/images/a.png", f"file://{corpus}/images/a.png", f"{corpus}/images/../images/a.png"]
    assert [reader.read(name) for name in inside] == [png(1)] * 3


def test_roots_of_the_configuration_are_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(png(9))
    (tmp_path / "data" / "x.zip").write_bytes(zipped({"in.png": png(8)}))
    access = ImageAccess(image_roots=(f"{tmp_path}/data/", "memory://shared"))
    reader = local(tmp_path, {"images/a.png": png(1)}, access)
    (tmp_path / "corpus" / "images" / "linked").symlink_to(tmp_path / "data")
    for name in (f"{tmp_path}/data/x.png", f"file://{tmp_path}/data/x.png", "linked/x.png"):
        assert reader.read(name) == png(9)
    assert reader.read(f"zip://in.png::file://{tmp_path}/data/x.zip") == png(8)
    Folder("memory://shared").write_bytes(png(7), "m.png")
    assert reader.read("memory://shared/m.png") == png(7)
    assert reason(reader, "memory://shared2/m.png") == "uri_refused"
    for bad in ("data", "./x"):
        with pytest.raises(ValueError, match="absolute path or a URI"):
            ImageAccess(image_roots=(bad,))


def test_a_snapshot_of_the_hub_is_made_of_links(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0123").write_bytes(png(5))
    (tmp_path / "secret.png").write_bytes(png(6))
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "images").mkdir(parents=True)
    (snapshot / "images" / "a.png").symlink_to("../../../blobs/0123")
    (snapshot / "images" / "b.png").symlink_to("../../../../secret.png")
    reader = ImageReader.of(Folder(str(snapshot)), LIMITS)
    assert reader.read("a.png") == png(5)
    assert reason(reader, "b.png") == "uri_refused"


def test_a_corpus_folder_that_is_gone_has_no_missing_images(tmp_path: Path) -> None:
    reader = replace(local(tmp_path, {"images/a.png": png(1)}), timeout_s=3)
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    threading.Timer(0.5, lambda: (tmp_path / "elsewhere").rename(tmp_path / "corpus")).start()
    assert reader.read("a.png") == png(1), "it came back in time"
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="is gone; mount it again"):
        reader.read("a.png")


@pytest.mark.parametrize("folder", ["", "images/", "images_zip/"])
@pytest.mark.parametrize("prefix", ["images/MSCOCO/", "MSCOCO/", ""])
def test_one_archive_for_each_sub_dataset(tmp_path: Path, folder: str, prefix: str) -> None:
    """MMEB-train: rows say ``images/MSCOCO/Train/1.png``."""
    reader = local(
        tmp_path,
        {
            f"{folder}MSCOCO.zip": zipped({f"{prefix}Train/1.png": png(1), f"{prefix}Train/": b""}),
            f"{folder}VOC2007.zip": zipped({f"{prefix.replace('MSCOCO', 'VOC2007')}Train/1.png": png(2)}),
        },
    )
    assert reader.read("images/MSCOCO/Train/1.png") == reader.read("MSCOCO/Train/1.png") == png(1)
    assert reader.read("images/VOC2007/Train/1.png") == png(2)
    for name in ("images/MSCOCO/Train/2.png", "images/MSCOCO/Train", "images/MSCOCO/Train/", "images/X/Train/1.png"):
        assert reason(reader, name) == "image_missing" or not prefix, name
    assert reader.files == (f"{folder}MSCOCO.zip", f"{folder}VOC2007.zip")


def test_members_of_every_kind(tmp_path: Path) -> None:
    kinds = {"stored": zipfile.ZIP_STORED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}
    files = {f"{kind}.zip": zipped({f"{kind}.png": png(i)}, compression=c) for i, (kind, c) in enumerate(kinds.items())}
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w") as archive:
            with archive.open("large.png", "w", force_zip64=True) as member:
                member.write(png(7))
            archive.writestr("twice.png", png(1))
            with warnings.catch_warnings(action="ignore"):
                archive.writestr("twice.png", png(2))
            info = zipfile.ZipInfo("extra.png")
            info.extra = b"\xfe\xca\xd0\x07" + bytes(2000)
            archive.writestr(info, png(8))
            archive.writestr("zeros.png", bytes(40 << 20), zipfile.ZIP_DEFLATED)
        whole = out.getvalue()
    files |= {"prefixed.zip": b"#!/bin/sh\n" * 9 + whole, "images.zip": zipped({"images/in.png": png(9)})}
    latin = bytearray(zipped({"crXme.png": png(3)}))
    files["latin.zip"] = bytes(latin.replace(b"crXme", b"cr\x8ame"))  # "è" in code page 437
    files["utf8.zip"] = zipped({"crXYme.png": png(4)}).replace(b"crXY", "crü".encode())  # without the flag
    reader = local(tmp_path, files)
    for i, kind in enumerate(kinds):
        assert reader.read(f"{kind}.png") == png(i)
    assert (reader.read("large.png"), reader.read("extra.png"), reader.read("twice.png")) == (png(7), png(8), png(2))
    assert reader.read("in.png") == reader.read("images/in.png") == png(9)
    assert (reader.read("crème.png"), reader.read("crüme.png")) == (png(3), png(4))
    assert reason(reader, "zeros.png") == "image_too_large"
    assert reason(reader, "../in.png") == "uri_refused"


def test_damaged_members_and_archives(tmp_path: Path) -> None:
    whole = bytearray(zipped({"a.png": png(1), "b.png": png(2)}, compression=zipfile.ZIP_STORED))
    at = whole.index(png(1))
    whole[at + 20] ^= 0xFF
    lying = bytearray(zipped({"l.png": png(3)}))
    lying[lying.index(b"PK\x01\x02") + 42] = 9  # the header is said to be elsewhere
    locked = bytearray(zipped({"k.png": png(4)}))
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    files = {"images.zip": bytes(whole), "lying.zip": bytes(lying), "locked.zip": bytes(locked)}
    reader = local(tmp_path, {**files, "other.zip": b"PK not an archive"})
    assert reader.read("b.png") == png(2)
    assert [reason(reader, f"{name}.png") for name in "alk"] == ["image_corrupt"] * 3
    assert len(reader.archives) == 3, "a damaged file beside the rows is none of its archives"
    for name in ("images.zip", "images/MSCOCO.zip"):
        with pytest.raises(ConfigError, match="write the archive again"):
            local(tmp_path, {name: zipped({"a.png": png(1)})[:-30]})
        (tmp_path / "corpus" / name).unlink()


def test_an_archive_with_more_members_than_sixteen_bits_count(tmp_path: Path) -> None:
    reader = local(tmp_path, {"images.zip": zipped({f"d/{i}.png": b"%d" % i for i in range(70_000)}, compression=0)})
    assert [reader.read(f"d/{i}.png") for i in (0, 35_000, 69_999)] == [b"0", b"35000", b"69999"]
    assert reason(reader, "d/70000.png") == "image_missing"


def test_archives_and_names_in_a_bucket(s3_env: S3Server) -> None:
    """One request for a member, whose archive's directory was read once."""
    name = unicodedata.normalize("NFD", "é.png")
    files = {
        "images/MSCOCO.zip": zipped({f"images/MSCOCO/{i}.png": png(i) for i in range(200)}),
        f"images/{name}": png(7),
    }
    root = write(Folder(f"s3://{s3_env.bucket}/zips"), files)
    reader = ImageReader.of(root, LIMITS)
    assert [reader.read(f"images/MSCOCO/{i}.png") for i in range(50)] == [png(i) for i in range(50)]
    assert reader.read(unicodedata.normalize("NFC", name)) == png(7)
    assert reader.read(f"s3://{s3_env.bucket}/zips/images/{name}") == png(7), "the bucket of the corpus"
    assert reader.read(f"zip://images/MSCOCO/3.png::s3://{s3_env.bucket}/zips/images/MSCOCO.zip") == png(3)
    assert reason(reader, "s3://another-bucket/a.png") == "uri_refused"
    assert reason(reader, "/etc/hostname") == reason(reader, "../x.png") == "uri_refused"


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
    reader = replace(ImageReader.of(root, LIMITS), timeout_s=5)
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
        ImageReader("s3://no-such-bucket/c", LIMITS, ImageAccess()).read("a.png")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY"):
        reader.read("a.png")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY"):
        reader.read("none.png")
    assert time.monotonic() - began < 20, "waiting would change nothing"
