"""A local copy of a checkpoint: a folder as it is, a cached download of an fsspec URI, or a hub snapshot."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import fsspec

from crem.errors import CheckpointError

__all__ = ["local_copy"]

logger = logging.getLogger(__name__)


def local_copy(path_or_uri: str | Path, *, cache: str | Path | None = None) -> Path:
    """A local folder with the checkpoint: itself, a cached download of a URI, or a hub snapshot.

    A download goes to a temporary folder first and is renamed when complete, so several processes of a node may ask at
    once. A changed checkpoint at the same URI has another ``crem.json`` or weights listing and is downloaded anew.
    """
    named = os.fspath(path_or_uri)
    if os.path.isdir(named):
        return Path(named)
    if "://" not in named:
        if named.startswith((".", "/", "~")) or named.count("/") != 1:
            raise CheckpointError(f"no checkpoint at {named!r}: the folder does not exist")
        return _hub_copy(named)
    cache = Path(cache or Path.home() / ".cache" / "crem" / "models")
    try:
        fs, root = fsspec.core.url_to_fs(named)
        fs.invalidate_cache()
        listing = sorted((f, fs.info(f)) for f in fs.find(root))
    except Exception as error:
        raise CheckpointError(f"cannot read {named!r}: {type(error).__name__}: {error}") from error
    if not listing:
        raise CheckpointError(f"no checkpoint at {named!r}: nothing is there")
    marks = [[f, i["size"], str(i.get("ETag") or i.get("mtime") or i.get("LastModified"))] for f, i in listing]
    key = hashlib.sha256(json.dumps([named, marks]).encode()).hexdigest()[:24]
    target = cache / key
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache, prefix=f"{key}.partial."))
        logger.info("downloading %s (%.1f MB)", named, sum(i["size"] for _, i in listing) / 1e6)
        try:
            for file, _ in listing:
                to = partial / os.path.relpath(file, root)
                to.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(file, str(to))
            os.replace(partial, target)
        except OSError as error:
            if not target.is_dir():  # otherwise another process was first
                raise CheckpointError(f"downloading {named!r} failed: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _hub_copy(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:
        raise CheckpointError(
            f"{name!r} is neither a folder here nor a checkpoint that the model hub gave "
            f"({type(error).__name__}). Give a folder or URI: model.backbone=s3://bucket/Qwen2-VL-2B-Instruct"
        ) from error
