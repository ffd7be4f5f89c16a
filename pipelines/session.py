"""Where the jobs meet Ray: connecting, checking that a job fits, and bringing a worker's error back as itself.

Ray Data reduces an exception of a worker to its text, and prints internal traces on the way. An error that is meant for
the user therefore travels as a value: ``attempt`` wraps it in the worker, ``results`` raises it in the driver.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data

from crem.errors import CremError, ResourceError

__all__ = ["attempt", "connect", "remote_errors", "require", "results"]

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 512 * 2**20
"""Object store of a Ray that we start. Training rows and their pictures pass through it; it spills to disk."""

_MIN_LOGICAL_CPUS = 4
"""A two-core machine still gets room for two train workers beside their data tasks."""


def connect() -> None:
    """Connect to Ray once: one that is initialised, else ``RAY_ADDRESS``, else one started here for this process.

    Raises:
        ResourceError: the cluster at ``RAY_ADDRESS`` does not answer.
    """
    _quieten_data()
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
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


def require(what: str, *, cpus: float, gpus: float, remedy: str) -> None:
    """Refuse a job that would wait for devices forever.

    A cluster that may grow (``RAY_ADDRESS``) only gets a warning: its autoscaler can still add the node.
    """
    have = ray.cluster_resources()
    for name, need in (("CPU", cpus), ("GPU", gpus)):
        if need <= have.get(name, 0):
            continue
        message = f"{what} needs {need:g} {name}, and Ray has {have.get(name, 0):g} here; {remedy}"
        if os.environ.get("RAY_ADDRESS", "local") == "local":
            raise ResourceError(message)
        log.warning("%s (unless the cluster grows)", message)


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
        root = _root_cause(error)
        if isinstance(root, CremError):
            raise root from None
        if isinstance(root, MemoryError | ray.exceptions.OutOfMemoryError):
            raise ResourceError(
                f"a worker ran out of memory: {root}; lower the batch size or the number of actors"
            ) from error
        raise


def _root_cause(error: BaseException) -> BaseException:
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
