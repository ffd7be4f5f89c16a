"""Writing a file only over what is known to be there: a whole version of it, or nothing.

Of several writers exactly one succeeds. S3 has conditional PUTs (``If-None-Match``, ``If-Match``); on a local disk, and
on network file systems, a hard link appears whole or fails where the name is taken. Other stores have neither here:
there ``write_new`` looks first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["is_s3", "put_over", "write_new"]

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Answers of file systems that have no hard links."""


def write_new(folder: Folder, data: bytes, *parts: str) -> bool:
    """Write a file, whole, unless there is one of this name; whether it is ours now.

    With the patience of the folder: a write whose answer was lost finds its own data, and is ours.
    """

    def attempt() -> bool:
        if is_s3(folder.fs):
            written = put_over(folder.fs, path, data, "") is not None
        elif isinstance(folder.fs, LocalFileSystem):
            written = _link(path, data)
        else:
            written = not folder.fs.exists(path)
            if written:
                folder.fs.pipe_file(path, data)
        return written or bytes(folder.fs.cat_file(path)) == data

    path = folder.path(*parts)
    if isinstance(folder.fs, LocalFileSystem):
        folder.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    return require_storage(f"writing {'/'.join([folder.uri, *parts])}", attempt, timeout_s=folder.patience_s)


def put_over(fs: fsspec.AbstractFileSystem, path: str, data: bytes, version: str) -> str | None:
    """Write an object of S3 over ``version`` (its entity tag; empty: over nothing).

    Returns the new version, or ``None`` where the object has another version by now.
    """
    bucket, key, _ = fs.split_path(path)
    condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
    try:
        answer = fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
    except OSError as error:
        response = getattr(error.__cause__, "response", {})
        refused = response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412)
        if refused or isinstance(error, FileExistsError) or (version and isinstance(error, FileNotFoundError)):
            return None
        raise
    return str(answer["ETag"])


def is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether a file system is S3."""
    return "s3" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _link(path: str, data: bytes) -> bool:
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(data)
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with contextlib.suppress(FileExistsError), open(path, "xb") as file:
            file.write(data)
            return True
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
