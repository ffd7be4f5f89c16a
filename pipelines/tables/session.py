"""Where the jobs meet Ray: connecting, checking that a job fits, and bringing a worker's error back as itself.

Ray Data reduces an exception of a worker to its text, and prints internal traces on the way. An error that is meant for
the user therefore travels as a value: ``attempt`` wraps it in the worker, ``results`` raises it in the driver.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crem.errors import ConfigError, CremError, ResourceError
from pipelines.tables.storage import Folder

__all__ = [
    "attempt",
    "connect",
    "on_cluster",
    "remote_errors",
    "require",
    "require_readable",
    "require_shared",
    "results",
    "root_cause",
]

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 512 * 2**20
"""Object store of a Ray that we start. Training rows and their images pass through it; it spills to disk."""

_MIN_LOGICAL_CPUS = 4
"""A two-core machine still gets room for two train workers beside their data tasks."""


_SHARED_TIMEOUT_S = 60


def connect() -> None:
    """Connect to Ray once: one that is initialised, else ``RAY_ADDRESS``, else one started here for this process.

    Raises:
        ConfigError: ``RAY_ADDRESS`` is a Ray Client address. ResourceError: the cluster there does not answer.
    """
    _quieten_data()
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS={address!r} is not the address of a cluster's control store. Ray Client (ray://) cannot run "
            "these jobs: send the job to the cluster with crem submit --address http://HEAD:8265 -- JOB …, or run it "
            "on a node of the cluster with RAY_ADDRESS=HEAD:6379 (or auto)"
        )
    if address and address != "local":
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ResourceError(
                f"no Ray cluster answers at RAY_ADDRESS={address!r}: {error}; start it, correct the address, or unset "
                "RAY_ADDRESS to run on this machine"
            ) from error
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        logging_level=logging.ERROR,  # at WARNING every start explains token authentication
        log_to_driver=log.isEnabledFor(logging.DEBUG),  # crem --verbose
    )


def _quieten_data() -> None:
    """Ray Data's progress bars on a terminal; elsewhere our own lines instead of its pages, unless --verbose."""
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    if log.isEnabledFor(logging.DEBUG):
        return
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)


def on_cluster() -> bool:
    """Whether jobs run on a cluster rather than on a Ray that they start themselves."""
    return ray.is_initialized() or os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def require(what: str, *, cpus: float, gpus: float, remedy: str) -> None:
    """Refuse a job that would wait for devices forever.

    A cluster that may grow (``RAY_ADDRESS``) only gets a warning: its autoscaler can still add the node.
    """
    have = ray.cluster_resources()
    needs = {"CPU": cpus, "GPU": gpus}
    if all(need <= have.get(name, 0) for name, need in needs.items()):
        return
    wanted, there = (
        " and ".join(f"{of.get(name, 0):g} {name}" for name in needs if needs[name] > have.get(name, 0))
        for of in (needs, have)
    )
    message = f"{what} needs {wanted}, and Ray has {there} here; {remedy}"
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        raise ResourceError(message)
    log.warning("%s (unless the cluster grows)", message)


def require_shared(folder: Folder) -> None:
    """Refuse a local output folder that another node of the cluster does not see; call ``connect`` first.

    Raises:
        ConfigError: a node does not see it.
    """
    if not folder.is_local or not _other_nodes():
        return
    token, existed = f"_shared_{uuid.uuid4().hex}", folder.exists()
    folder.write_bytes(b"", token)
    try:
        _require_seen(folder.path(token), f"{folder.uri}; give --out a path", folder.uri)
    finally:
        folder.remove(token)
        if not existed:
            with contextlib.suppress(OSError):
                os.rmdir(folder.path())


def require_readable(folder: Folder, file: str) -> None:
    """Refuse a local input folder that another node of the cluster does not see; call ``connect`` first.

    Args:
        file: one that is in it.

    Raises:
        ConfigError: a node does not see it.
    """
    if folder.is_local and _other_nodes():
        _require_seen(folder.path(file), f"{folder.uri}, from which its workers would read; copy it to", folder.uri)


def _other_nodes() -> list[dict[str, Any]]:
    here = ray.get_runtime_context().get_node_id()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]


def _require_seen(path: str, remedy: str, named: str) -> None:
    """Look for a local file from every other node."""
    look = ray.remote(num_cpus=0, max_retries=0)(os.path.exists)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(path): node[
            "NodeManagerAddress"
        ]
        for node in _other_nodes()
    }
    ready, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=_SHARED_TIMEOUT_S)
    for answer in ready:
        try:
            sees = ray.get(answer)
        except ray.exceptions.RayError:  # the node went meanwhile
            waiting.append(answer)
            continue
        if not sees:
            raise ConfigError(
                f"the node {asked[answer]} of this cluster does not see {remedy} on a file system that all nodes "
                "share, or an s3:// URI"
            )
    if waiting:
        log.warning(
            "%d nodes did not say whether they see %s; if it is not on a file system that all nodes share, use a "
            "shared path or an s3:// URI",
            len(waiting),
            named,
        )


def attempt(function: Callable[[], Any]) -> dict[str, bytes]:
    """In a worker: the pickled value of ``function()``, or the pickled error that the user should see."""
    try:
        return {"value": pickle.dumps(function()), "error": b""}
    except CremError as error:
        log.debug("sent to the driver", exc_info=True)
        return {"value": b"", "error": pickle.dumps(error)}
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        full = ResourceError(f"no space left for {error.filename}; free some or choose another --out")
        return {"value": b"", "error": pickle.dumps(full)}


def results(dataset: ray.data.Dataset) -> Iterator[Any]:
    """In the driver: what ``attempt`` returned in each task, as it arrives; raises the first error."""
    for row in dataset.iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        yield pickle.loads(row["value"])


@contextmanager
def remote_errors() -> Iterator[None]:
    """Raise the ``CremError`` at the root of a failed Ray call instead of Ray's wrapping of it."""
    try:
        yield
    except CremError:
        raise
    except Exception as error:
        root = root_cause(error)
        if isinstance(root, CremError):
            raise root from None
        if isinstance(root, MemoryError | ray.exceptions.OutOfMemoryError):
            raise ResourceError(
                f"a worker ran out of memory: {root}; lower the batch size or the number of actors"
            ) from error
        raise


def root_cause(error: BaseException) -> BaseException:
    """The first error of ours in the chain of causes, else the last of the chain."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "cause", None)  # ray.exceptions.RayTaskError keeps the user's exception here
        below = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
        if isinstance(error, CremError) or below is None:
            return error
        error = below
    return error
