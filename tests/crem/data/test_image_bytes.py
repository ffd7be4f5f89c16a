"""Bytes of images: what holds them, and which failures are the data's."""

from __future__ import annotations

import base64
import errno
import io
import os
import pickle
import textwrap
from pathlib import Path

import botocore.exceptions
import pytest
from PIL import Image, features

from crem.config import ImageConfig
from crem.data.image_bytes import inline_bytes, is_inline, read_bytes, read_error
from crem.errors import ItemError, StorageError, shortened

LIMITS = ImageConfig()
KINDS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_base64_of_every_form_is_the_image(kind: str) -> None:
    data = encoded(kind)
    plain, url_safe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
    wrapped = "\n".join(textwrap.wrap(plain, 76)) + "\n"
    forms = [plain, plain.rstrip("="), url_safe, url_safe.rstrip("="), wrapped, wrapped.replace("\n", "\r\n")]
    for form in forms:
        assert is_inline(form) and inline_bytes(form, LIMITS) == data
        for header in ("data:image/x;base64,", "DATA:;BASE64,", "data:image/x;charset=utf-8;name=a.b;Base64,"):
            assert is_inline(header + form) and inline_bytes(header + form, LIMITS) == data


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "images/COCO_train2014_000000000009.jpg",
        "iVBORw0KGgo.png",
        "/9j/4AAQSkZJRgABAQEASABIAAD/2wBDAAIBAQIBAQICAgICAgICAwUDAwMDAwYEBAMFBwYHBwcGBwcICQsJCAgKCAcHCg.jpg",
        "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "Qk0-" * 20,
        "R0lGODlh",
        "x" * 300,
        "s3://bucket/" + "a" * 100,
    ],
)
def test_names_are_not_taken_for_base64(name: str) -> None:
    assert not is_inline(name) and inline_bytes(name, LIMITS) is None


def test_base64_of_something_else_is_refused_in_one_short_line() -> None:
    text = base64.b64encode(os.urandom(60_000)).decode()
    with pytest.raises(ItemError) as error:
        read_bytes(text, LIMITS)
    assert error.value.reason == "image_corrupt" and "base64" in error.value.detail
    assert len(error.value.detail) < 200


def test_base64_is_bounded_before_it_is_decoded() -> None:
    data = encoded("PNG")
    limits = ImageConfig(max_source_bytes=len(data))
    text = base64.b64encode(data).decode()
    assert read_bytes(text, limits) == data
    with pytest.raises(ItemError, match="image_too_large"):
        read_bytes(text, ImageConfig(max_source_bytes=len(data) - 1))


def test_long_names_are_shown_by_head_and_tail(tmp_path: Path) -> None:
    whole = "d/" * 90 + "name.png"
    with pytest.raises(ItemError) as error:
        read_bytes(str(tmp_path / whole)[-200:], LIMITS)
    assert str(tmp_path / whole)[-200:] in error.value.detail, "names up to 200 characters are shown in full"
    for name in ("x/" * 1000 + "tail.png", "x" * 10_000 + ".png", "s3://b/" + "k" * 5000, "http://h/" + "k" * 5000):
        with pytest.raises(ItemError) as error:
            read_bytes(name, LIMITS)
        assert len(error.value.detail) <= 300 and " characters" in error.value.detail, "a cut name says so"


def test_shortened() -> None:
    assert shortened("a" * 200) == "a" * 200
    cut = shortened("head" + "x" * 500 + "tail")
    assert len(cut) == 200 and cut.startswith("head") and cut.endswith("tail") and "508 characters" in cut
    long = ItemError("r", "y" * 1000)
    assert len(long.detail) == 300 and pickle.loads(pickle.dumps(long)).detail == long.detail


def test_what_is_not_a_file_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("pipe", "loop", "file/a.png", "", "n" * 300, "zero\0byte", "\udc80.png"):
        with pytest.raises(ItemError) as error:
            read_bytes(f"{tmp_path}/{name}", LIMITS)
        assert error.value.reason == "image_missing", name


def answer(code: str, status: int) -> botocore.exceptions.ClientError:
    return botocore.exceptions.ClientError(
        {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
    )


def translated(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (translated(FileNotFoundError("m"), answer("NoSuchKey", 404)), "image_missing"),
        (FileNotFoundError("m"), "image_missing"),
        (KeyError("no item named"), "image_missing"),
        (translated(OSError(errno.EINVAL, "m"), answer("InvalidRange", 416)), "image_corrupt"),
        (EOFError("m"), "image_corrupt"),
        (translated(FileNotFoundError("m"), answer("NoSuchBucket", 404)), False),
        (translated(PermissionError("m"), answer("AccessDenied", 403)), False),
        (translated(PermissionError("m"), answer("SignatureDoesNotMatch", 403)), False),
        (botocore.exceptions.NoCredentialsError(), False),
        (ImportError("install gcsfs"), False),
        (ValueError("Invalid endpoint: x"), False),
        (translated(OSError(errno.EBUSY, "m"), answer("SlowDown", 503)), True),
        (translated(OSError(errno.EREMOTEIO, "m"), answer("InternalError", 500)), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), True),
        (ConnectionRefusedError("m"), True),
        (TimeoutError("m"), True),
        (OSError(errno.EIO, "m"), True),
        (OSError(errno.ESTALE, "m"), True),
        (OSError(errno.EMFILE, "m"), True),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_only_absence_and_damage_are_faults_of_the_data(error: Exception, expected: str | bool) -> None:
    meaning = read_error("s3://bucket/" + "k" * 900, error)
    again = pickle.loads(pickle.dumps(meaning))
    assert str(again) == str(meaning) and len(str(meaning)) < 800
    if isinstance(expected, str):
        assert isinstance(again, ItemError) and again.reason == expected
    else:
        assert isinstance(again, StorageError) and again.transient is expected
