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
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from fsspec.implementations.local import LocalFileSystem
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crem.errors import ConfigError, CremError, ResourceError
from crem.ray_address import refuse_ray_client
from pipelines.tables.storage import Folder

__all__ = [
    "attempt",
    "connect",
    "on_cluster",
    "remote_errors",
    "require",
    "require_readable",
    "require_readable_model",
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
_LOOKS, _LOOK_EVERY_S = 7, 0.5


def connect() -> None:
    """Connect to Ray once: one that is initialised, else ``RAY_ADDRESS``, else one started here for this process.

    Raises:
        ConfigError: ``RAY_ADDRESS`` is a Ray Client address. ResourceError: the cluster there does not answer.
    """
    _quieten_data()
    if ray.is_initialized():
        return
    if address := _address():
        refuse_ray_client(address)
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
    return ray.is_initialized() or bool(_address())


def _address() -> str:
    """``RAY_ADDRESS`` where it names a cluster, else the empty string."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


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
    if not _address():
        raise ResourceError(message)
    log.warning("%s (unless the cluster grows)", message)


def require_shared(folder: Folder) -> None:
    """Refuse a local output folder that a node of the cluster does not see; call ``connect`` first.

    Raises:
        ConfigError: a node does not see it.
    """
    if not isinstance(folder.fs, LocalFileSystem) or not (nodes := _nodes()):
        return
    token, existed = f"_shared_{uuid.uuid4().hex}", folder.exists()
    folder.write_bytes(b"shared", token)
    try:
        _require_seen(nodes, [folder.path(token)], f"{folder.uri}; give --out a path")
    finally:
        folder.remove(token)
        if not existed:
            with contextlib.suppress(OSError):
                os.rmdir(folder.path())


def require_readable(folder: Folder, *files: str) -> None:
    """Refuse a local input folder that a node of the cluster does not see; call ``connect`` first.

    Args:
        files: those in it that workers read; each node must see them as large as they are here.

    Raises:
        ConfigError: a node does not see them.
    """
    if files and isinstance(folder.fs, LocalFileSystem) and (nodes := _nodes()):
        remedy = f"{folder.uri}, from which its workers would read; copy it to a place"
        _require_seen(nodes, [folder.path(file) for file in files], remedy)


def require_readable_model(model: str) -> None:
    """``require_readable`` of a checkpoint that is a folder here; any other is fetched by each node for itself."""
    if os.path.isdir(model):
        folder = Folder.at(model)
        require_readable(folder, *folder.files())


def _nodes() -> dict[str, str]:
    """Address by id of all nodes; none where Ray is this machine's alone.

    The driver's own node counts: its processes may run in a container that sees other folders than the driver does.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return nodes if len(nodes) > 1 or _address() else {}


def _sizes(paths: list[str], expected: list[int]) -> list[int | None]:
    """In a task: the files' sizes. Looks again for some seconds: a file system may be slow to show a new file."""
    for _ in range(_LOOKS):
        found = [os.path.getsize(path) if os.path.isfile(path) else None for path in paths]
        if found == expected:
            break
        time.sleep(_LOOK_EVERY_S)
    return found


def _require_seen(nodes: dict[str, str], paths: list[str], remedy: str) -> None:
    """Look for local files from every node."""
    remedy += " on a file system that all nodes share, or an s3:// URI"
    expected = [os.path.getsize(path) for path in paths]
    look = ray.remote(num_cpus=0, max_retries=0)(_sizes)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths, expected): name
        for node, name in nodes.items()
    }
    ready, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=_SHARED_TIMEOUT_S)
    for answer in ready:
        try:
            seen = ray.get(answer) == expected
        except ray.exceptions.RayError:  # the node went meanwhile
            waiting.append(answer)
            continue
        if not seen:
            raise ConfigError(f"the node {asked[answer]} of this cluster does not see {remedy}")
    if waiting:
        log.warning("%d nodes did not say whether they see %s", len(waiting), remedy)


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
