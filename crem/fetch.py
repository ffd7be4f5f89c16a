"""A local copy of a checkpoint: a local folder, a checkpoint shipped with crem, a cached download of an fsspec URI, or
a hub snapshot."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from filelock import FileLock

from crem.errors import CheckpointError

__all__ = ["MODELS", "SHIPPED", "local_copy", "shipped"]

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "checkpoints"
"""Checkpoints shipped with crem, by name: ``crem-micro`` and the backbone it was trained from."""
MODELS = Path(".cache", "crem", "models")
"""Folder of downloads, relative to the home folder; the Kubernetes manifests mount a volume above it."""


_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README*"]


def local_copy(path_or_uri: str | Path, *, cache: str | Path | None = None) -> Path:
    """A local folder with the checkpoint: the given one, a shipped one by its name, a cached download, a hub snapshot.

    A download goes to a partial folder first and is renamed when complete; of several processes on a node, one
    downloads and the others wait. A changed checkpoint at the same URI has another listing (size, ETag or date of a
    file) and is downloaded again.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be downloaded.
    """
    named = os.fspath(path_or_uri)
    if os.path.isdir(named):
        return Path(named)
    if folder := shipped(named):
        return folder
    if "://" not in named:
        # "organisation/model" is a name on the hub, unless a folder "organisation" exists here
        if named.startswith((".", "/", "~")) or named.count("/") != 1 or os.path.isdir(os.path.dirname(named)):
            raise _missing(named)
        return _hub_copy(named)
    cache = Path(cache or Path.home() / MODELS)
    try:
        fs, root = fsspec.core.url_to_fs(named)
        fs.invalidate_cache()
        listing = sorted((f, fs.info(f)) for f in fs.find(root))
    except Exception as error:
        raise CheckpointError(f"cannot read {named!r}: {type(error).__name__}: {error}") from error
    if not listing:
        raise CheckpointError(f"no checkpoint at {named!r}: the location is empty")
    versions = [[f, i["size"], str(i.get("ETag") or i.get("mtime") or i.get("LastModified"))] for f, i in listing]
    key = hashlib.sha256(json.dumps([named, versions]).encode()).hexdigest()[:24]
    target = cache / key
    if not target.is_dir():
        logger.info("downloading %s (%.1f MB)", named, sum(i["size"] for _, i in listing) / 1e6)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / f"{key}.lock"):
                if not target.is_dir():  # otherwise another process was first
                    _download(fs, root, [file for file, _ in listing], target)
        except CheckpointError:
            raise
        except Exception as error:  # botocore and OS errors alike
            raise CheckpointError(f"downloading {named!r} failed: {type(error).__name__}: {error}") from error
    return target


def shipped(name: str) -> Path | None:
    """The folder of a checkpoint shipped with crem, by its name."""
    folder = SHIPPED / name
    return folder if os.path.basename(name) == name and (folder / "config.json").is_file() else None


def _download(fs: Any, root: str, files: list[str], target: Path) -> None:
    """Download ``files`` below ``root`` into the folder ``target``, which is created complete or not at all."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process; the caller has the lock
    try:
        for file in files:
            name = file.removeprefix(root).lstrip("/")
            if ".." in PurePosixPath(name).parts:  # object stores allow it; a local path would leave the folder
                raise CheckpointError(f"{file!r} has a '..' in its name and is not downloaded; rename or remove it")
            to = partial / name
            to.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(file, str(to))
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _missing(named: str) -> CheckpointError:
    """The error for a missing local folder, with the nearest existing name."""
    parent, name = os.path.split(named.rstrip("/"))
    try:
        near = difflib.get_close_matches(name, [e.name for e in os.scandir(parent or ".") if e.is_dir()], n=1)
    except OSError:
        near = []
    hint = f"; did you mean {os.path.join(parent, near[0])!r}?" if near else ""
    return CheckpointError(f"no checkpoint at {named!r}: the folder does not exist{hint}")


def _hub_copy(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise CheckpointError(
            f"{name!r} is neither a local folder nor could it be downloaded from the model hub "
            f"({type(error).__name__}). Give a folder or URI: model.backbone=s3://bucket/Qwen2-VL-2B-Instruct"
        ) from error
