"""Reading the bytes of an encoded image: from a path, an fsspec URI, a ``data:`` URL or plain base64.

The number of bytes is bounded before they are read. Only the schemes of ``SCHEMES`` are read: a server that fetches any
client's URI (``http``, ``webhdfs``, ``sftp``, …) can be used to attack its own network, and a batch job that does so
depends on foreign machines. fsspec's caching schemes are refused: they copy the entire file to disk before its size is
known.

Two kinds of failure are told apart. The data is at fault (``ItemError``) only where the store says that the name is not
there, or the bytes are no image. All else (a refused connection, a time-out, 5xx, wrong credentials, a missing bucket)
is a ``StorageError``: a job tries again, and then fails; it never rejects the row.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import re
import stat
import string
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

import fsspec
from fsspec.implementations.local import LocalFileSystem

from crem.config import ImageConfig
from crem.errors import CremError, ItemError, StorageError, shortened

__all__ = [
    "SCHEMES",
    "inline_bytes",
    "is_inline",
    "read_bytes",
    "read_error",
    "read_file",
    "schemes_of",
    "too_many_bytes",
]

SCHEMES = frozenset({"file", "local", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "zip", "tar", "memory"})
_MAX_NAME_BYTES = 4096
"""The longest path of Linux; S3 takes 1,024."""
_SHORTEST_BASE64 = 32
"""Characters; the smallest useful image files have some 30 bytes."""
_LONGEST_PLAIN_NAME = 600
"""Characters; a longer value that has only those of base64 in it is base64, and no name."""
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|BM....\0\0\0\0|....ftypavi|P[1-6]\s", re.DOTALL
)
"""How the files of the formats that are read begin."""
_BASE64 = frozenset(string.ascii_letters + string.digits + "+/-_=")
_NAME_ERRORS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP})
_ABSENT_CODES = frozenset({"NoSuchKey", "NoSuchVersion", "KeyTooLongError", "InvalidURI"})
_DENIED_CODES = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403"}
)


def read_bytes(uri: str, limits: ImageConfig, *, base: str | None = None) -> bytes:
    """Read an encoded image, never more than ``limits.max_source_bytes``.

    Args:
        uri: path, URI, ``data:`` URL or base64.
        base: as for ``load_image``.

    Raises:
        ItemError: ``image_missing``, ``image_corrupt``, ``image_too_large`` or ``uri_refused``.
        StorageError: the store cannot be asked.
    """
    try:
        return fetch_bytes(uri, limits, base=base)
    except CremError:
        raise
    except Exception as error:
        raise read_error(uri, error) from error


def fetch_bytes(uri: str, limits: ImageConfig, *, base: str | None = None) -> bytes:
    """``read_bytes``, for a caller that tries again: failures of the store are raised as they come."""
    if (inline := inline_bytes(uri, limits)) is not None:
        return inline
    schemes = schemes_of(uri)
    if refused := sorted(schemes - SCHEMES):
        raise ItemError(
            "uri_refused",
            f"{refused[0]}: URIs are not fetched ({shortened(uri, 60)!r}), only {', '.join(sorted(SCHEMES))}; "
            "download it, or send it as a data: URL",
        )
    if not schemes and base is not None and not os.path.isabs(uri):
        uri = base.replace("*", uri) if "*" in base else f"{base.rstrip('/')}/{uri}"
    if len(uri.encode(errors="replace")) > _MAX_NAME_BYTES:
        raise ItemError("image_missing", f"{shortened(uri, 120)!r} is longer than any file name; correct the row")
    fs, path = fsspec.core.url_to_fs(uri)
    data = read_file(fs, path, limits.max_source_bytes + 1)
    if len(data) > limits.max_source_bytes:
        raise too_many_bytes(len(data), limits)
    return data


def read_file(fs: fsspec.AbstractFileSystem, path: str, size: int) -> bytes:
    """At most the first ``size`` bytes of a file, in one request of an object store. Raises what ``fs`` raises."""
    if isinstance(fs, LocalFileSystem):
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder", path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise FileNotFoundError(errno.ENOENT, "is not a regular file", path)
        with open(path, "rb") as file:
            return file.read(min(size, status.st_size + 1))
    return bytes(fs.cat_file(path, start=0, end=size))


def schemes_of(uri: str) -> set[str]:
    """The scheme of every part of a chain such as ``zip://a.png::s3://bucket/images.zip``; none of a plain path."""
    parts = uri.split("::")
    schemes = {part.partition("://")[0].lower() for part in parts if "://" in part}
    if len(parts) > 1:  # fsspec reads a bare name in a chain as a scheme: simplecache::s3://bucket/a.png
        schemes |= {part.lower() for part in parts if re.fullmatch(r"[\w+-]+", part)}
    return schemes


def read_error(name: str, error: Exception) -> CremError:
    """What an exception means that was raised while ``name`` was read: an ``ItemError`` or a ``StorageError``."""
    if isinstance(error, CremError):
        return error
    shown = shortened(name)
    chain = list(_causes(error))
    codes = {str(code) for e in chain if (code := _response_code(e))}
    kinds = {type(e).__name__ for e in chain}
    told = shortened(f"{type(error).__name__}: {error}".replace("\n", " "), 300)
    if "NoSuchBucket" in codes:
        return StorageError(f"the bucket of {shown!r} does not exist ({told}); create it or correct its name", False)
    if codes & _DENIED_CODES or isinstance(error, PermissionError) or any("Credential" in kind for kind in kinds):
        return StorageError(
            f"{shown!r} may not be read: {told}; check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY). "
            "S3 also answers so for a name that does not exist where s3:ListBucket is not granted",
            False,
        )
    if "416" in codes or "InvalidRange" in codes:  # the first byte of an object of 0 bytes
        return ItemError("image_corrupt", f"{shown!r} has 0 bytes; upload it again")
    absent = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | KeyError)
    if absent or codes & _ABSENT_CODES or getattr(error, "errno", None) in _NAME_ERRORS:
        is_folder = isinstance(error, IsADirectoryError)
        return ItemError("image_missing", f"{shown!r} {'is a folder, not a file' if is_folder else 'does not exist'}")
    if isinstance(error, UnicodeError) or "ParamValidationError" in kinds or "null byte" in str(error):
        return ItemError("image_missing", f"{shown!r} is not a name that this store can hold; correct the row")
    if isinstance(error, zipfile.BadZipFile | tarfile.ReadError | zlib.error | EOFError):
        return ItemError("image_corrupt", f"{shown!r} is damaged in its archive: {shortened(str(error), 60)}")
    if isinstance(error, ImportError | ValueError):  # no client for the scheme, or AWS_ENDPOINT_URL is not a URL
        return StorageError(f"{shown!r} cannot be opened: {told}; install what it names, or correct the address", False)
    return StorageError(f"{shown!r} cannot be read: {told}; run again once its storage answers")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, and what it was translated from: s3fs turns botocore's errors into Python's."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _response_code(error: BaseException) -> object:
    """The code of an answer of S3, where ``error`` is one."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def is_inline(source: object) -> bool:
    """Whether an image's value holds the image itself (bytes, ``data:`` URL, base64), instead of naming it."""
    return isinstance(source, bytes) or (isinstance(source, str) and (_is_data_url(source) or _is_base64(source)))


def inline_bytes(source: str, limits: ImageConfig) -> bytes | None:
    """The bytes that a ``data:`` URL or base64 text holds; ``None`` where ``source`` names a file.

    Plain base64 is how tables of text carry images. It is taken for an image where it decodes to the header of one.

    Raises:
        ItemError: ``image_corrupt`` or ``image_too_large``.
    """
    if _is_data_url(source):
        header, comma, payload = source.partition(",")
        if not comma or header.rpartition(";")[2].strip().lower() != "base64":
            raise ItemError("image_corrupt", "a data: URL must be 'data:image/<type>;base64,<payload>'")
        return _decode_base64(payload, limits)
    if _is_base64(source):
        return _decode_base64(source, limits)
    if len(source) > _LONGEST_PLAIN_NAME and _BASE64.issuperset("".join(source[:512].split())):
        raise ItemError(
            "image_corrupt",
            f"{len(source)} characters of base64 ({source[:60]!r}…) that do not start like an image of a known format",
        )
    return None


def _is_data_url(source: str) -> bool:
    return source[:5].lower() == "data:"


def _is_base64(source: str) -> bool:
    """Whether plain text is the base64 of a known image format. A file name has a dot in it; base64 has none."""
    if len(source) < _SHORTEST_BASE64 or "." in source[-6:]:
        return False
    head = "".join(source[:400].split())[:64]
    if len(head) < _SHORTEST_BASE64 or not _BASE64.issuperset(head):
        return False
    head = head.rstrip("=")
    try:
        start = base64.b64decode(head[: len(head) // 4 * 4], altchars=b"-_" if set(head) & set("-_") else None)
    except (binascii.Error, ValueError):
        return False
    return _MAGIC.match(start) is not None


def _decode_base64(payload: str, limits: ImageConfig) -> bytes:
    """Decode base64 in either alphabet, with or without padding, in lines of any length."""
    if len(payload) * 3 // 4 > limits.max_source_bytes + 4 and len("".join(payload.split())) * 3 // 4 > (
        limits.max_source_bytes + 2
    ):
        raise too_many_bytes(len(payload) * 3 // 4, limits)
    text = "".join(payload.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ItemError("image_corrupt", f"{len(payload)} characters that are not base64: {error}") from error
    if len(data) > limits.max_source_bytes:
        raise too_many_bytes(len(data), limits)
    return data


def too_many_bytes(size: int, limits: ImageConfig) -> ItemError:
    """The error of an image over ``limits.max_source_bytes``."""
    return ItemError(
        "image_too_large",
        f"more than {min(size, limits.max_source_bytes)} bytes; the limit is {limits.max_source_bytes}; "
        "shrink it or raise model.image.max_source_bytes",
    )
