"""Whether every node of the cluster sees the local folders of a job.

A local path on a cluster is right only on a file system that all nodes share. Otherwise workers read nothing, or leave
their parts on disks of their own. Each check runs one task per node; call ``session.connect`` first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid

import ray
from fsspec.implementations.local import LocalFileSystem
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crem.errors import ConfigError
from pipelines.tables.manifest import table_parts
from pipelines.tables.session import cluster_address
from pipelines.tables.storage import Folder

__all__ = ["require_readable", "require_readable_model", "require_readable_tables", "require_shared"]

log = logging.getLogger(__name__)

_TIMEOUT_S = 60
_MOST_FILES = 1000
"""Of a corpus of more files, so many are looked for, spread over it."""
_TRIES, _RETRY_EVERY_S = 7, 0.5
"""A network file system may take some seconds to show a new file."""


def require_shared(folder: Folder) -> None:
    """Refuse a local output folder that a node of the cluster does not see.

    Raises:
        ConfigError: a node does not see it.
    """
    if not isinstance(folder.fs, LocalFileSystem) or not (nodes := _nodes()):
        return
    probe, existed = f"_shared_{uuid.uuid4().hex}", folder.exists()
    folder.write_bytes(b"shared", probe)
    try:
        _require_seen(nodes, [folder.path(probe)], f"{folder.uri}; give --out a path")
    finally:
        folder.remove(probe)
        if not existed:
            with contextlib.suppress(OSError):
                os.rmdir(folder.path())


def require_readable(folder: Folder, *files: str) -> None:
    """Refuse a local input folder that a node of the cluster does not see.

    Args:
        files: the files in it that workers read; each node must see them at the size that they have here. Of many, some
            are looked for.

    Raises:
        ConfigError: a node does not see them.
    """
    if files and isinstance(folder.fs, LocalFileSystem) and (nodes := _nodes()):
        remedy = f"{folder.uri}, from which its workers would read; copy it to a place"
        some = files[:: -(-len(files) // _MOST_FILES)]
        # not the folders that are read as one file: Lance datasets, folders of images
        _require_seen(nodes, [path for file in some if os.path.isfile(path := folder.path(file))], remedy)


def require_readable_model(model: str) -> None:
    """``require_readable`` of a checkpoint that is a local folder; each node fetches any other for itself."""
    if os.path.isdir(model):
        folder = Folder.at(model)
        require_readable(folder, *folder.files())


def require_readable_tables(prepared: str) -> None:
    """``require_readable`` of prepared tables."""
    for table in ("rows", "images"):
        require_readable(Folder.at(prepared).child(table), *table_parts(Folder.at(prepared), table))


def _nodes() -> dict[str, str]:
    """Addresses of all nodes by id; empty where Ray runs on this machine alone.

    The driver's own node counts: its processes may run in a container that sees other folders than the driver does.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return nodes if len(nodes) > 1 or cluster_address() else {}


def _sizes(paths: list[str], expected: list[int]) -> list[int | None]:
    """On a node: the sizes of the files, ``None`` for those that are not there; retries until they are as expected."""
    for _ in range(_TRIES):
        sizes = [os.path.getsize(path) if os.path.isfile(path) else None for path in paths]
        if sizes == expected:
            break
        time.sleep(_RETRY_EVERY_S)
    return sizes


def _require_seen(nodes: dict[str, str], paths: list[str], remedy: str) -> None:
    remedy += " on a file system that all nodes share, or an s3:// URI"
    expected = [os.path.getsize(path) for path in paths]
    check = ray.remote(num_cpus=0, max_retries=0)(_sizes)
    address_of = {
        check.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            paths, expected
        ): address
        for node, address in nodes.items()
    }
    ready, unanswered = ray.wait(list(address_of), num_returns=len(address_of), timeout=_TIMEOUT_S)
    for reference in ready:
        try:
            sizes = ray.get(reference)
        except ray.exceptions.RayError:  # the node left the cluster meanwhile
            unanswered.append(reference)
            continue
        if sizes != expected:
            raise ConfigError(f"the node {address_of[reference]} of this cluster does not see {remedy}")
    if unanswered:
        log.warning("%d nodes did not answer whether they see %s", len(unanswered), remedy)
