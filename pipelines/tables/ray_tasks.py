"""Typed tasks through Ray Data, and a worker's error in the driver as itself.

Ray Data moves columns rather than objects, and it reduces an exception of a worker to its text after printing internal
traces. A task therefore travels as a pickled column, and so does its result or the error that is meant for the user:
the driver calls ``task_dataset`` and ``results``, the worker calls ``attempt``.
"""

from __future__ import annotations

import errno
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import ray
import ray.data

from crem.errors import CremError, ResourceError
from pipelines.tables.part_reads import in_threads

__all__ = [
    "TASK",
    "attempt",
    "disk_full",
    "on_nodes",
    "remote_errors",
    "results",
    "root_cause",
    "shuffle_buckets",
    "shuffle_rounds",
    "stream",
    "task_dataset",
]

log = logging.getLogger(__name__)

TASK = "task"
"""Column of ``task_dataset``: one pickled task a row."""
_TASK_ITEMS = 32
"""Items of one task of ``on_nodes``."""
_S = TypeVar("_S")
_T = TypeVar("_T")

_BLOCKS_PER_CPU = 16
_TASKS_PER_CPU = 32
_FEWEST, _MOST = 1024, 8192
"""Tasks of one Ray Data execution: the wait for its last ones costs little, and its driver keeps 10 KB for each."""

_IDS_PER_CPU = 2_000_000
"""Ids in one shuffle: Ray Data's actors and tasks held 50 to 90 bytes for each (``bench_prepare_scale``)."""
_MOST_BUCKETS = 1024


def task_dataset(tasks: Sequence[Any], *, together: int = 1) -> ray.data.Dataset:
    """In the driver: a dataset of ``tasks``, one row each.

    Args:
        together: most tasks in a block, which one Ray task runs: Ray Data takes some 20 ms for a block, measured on two
            cores. Every CPU gets several blocks before one gets two tasks.
    """
    fewest = min(len(tasks), _BLOCKS_PER_CPU * _cpus())
    blocks = max(fewest, -(-len(tasks) // together))
    return ray.data.from_items([{TASK: pickle.dumps(task)} for task in tasks], override_num_blocks=blocks)


def attempt(function: Callable[[Any], Any], task: bytes) -> dict[str, bytes]:
    """In a worker: the pickled value of ``function(task)``, or the pickled error that the user should see."""
    try:
        return {"value": pickle.dumps(function(pickle.loads(task))), "error": b""}
    except CremError as error:
        log.debug("sent to the driver", exc_info=True)
        return {"value": b"", "error": pickle.dumps(error)}
    except OSError as error:
        if (full := disk_full(error)) is None:
            raise
        return {"value": b"", "error": pickle.dumps(full)}


def disk_full(error: BaseException) -> ResourceError | None:
    """The error for the user where a disk, or a quota, has no space left."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return ResourceError(
        f"no space left for {error.filename or 'a file'}; free some, then run the same command again: it continues"
    )


def results(dataset: ray.data.Dataset) -> Iterator[Any]:
    """In the driver: the value of each ``attempt``, as it arrives; raises the first error."""
    for row in dataset.iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        yield pickle.loads(row["value"])


def on_nodes(call: Callable[[_S], _T], items: Iterable[_S]) -> list[_T]:
    """``in_threads`` spread over the cluster: ``call`` of each item, in their order."""
    known = list(items)
    in_task = ray.remote(num_cpus=0.25)(in_threads)
    tasks = [in_task.remote(call, known[at : at + _TASK_ITEMS]) for at in range(0, len(known), _TASK_ITEMS)]
    return [result for results_of_task in ray.get(tasks) for result in results_of_task]


def stream(function: Callable[[_S], _T], tasks: Iterable[_S], *, together: int = 1) -> Iterator[_T]:
    """In the driver: ``function`` of every task, run by Ray Data; results come as they are ready, in any order.

    Tasks are taken from the iterator as they are needed, so that there may be any number of them.

    Args:
        together: as in ``task_dataset``, for tasks that are short.
    """
    most = min(_MOST, max(_FEWEST, _TASKS_PER_CPU * _cpus()))
    waiting = iter(tasks)
    run = partial(attempt, function)
    while chunk := list(islice(waiting, most)):
        yield from results(task_dataset(chunk, together=together).map(lambda row: run(row[TASK])))


def shuffle_rounds(ids: int) -> int:
    """In how many shuffles so many ids are brought together, so that the actors that hold them stay small."""
    return max(1, -(-ids // (_IDS_PER_CPU * _cpus())))


def shuffle_buckets() -> int:
    """Buckets of one of these shuffles."""
    return min(_MOST_BUCKETS, 2 * _cpus())


def _cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


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
        if (full := disk_full(root)) is not None:
            raise full from error
        if isinstance(root, MemoryError | ray.exceptions.OutOfMemoryError):
            raise ResourceError(
                f"a worker ran out of memory: {root}; lower the batch size or the number of actors"
            ) from error
        raise


def root_cause(error: BaseException) -> BaseException:
    """The first ``CremError`` in the chain of causes, else the last error of the chain."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        cause = getattr(error, "cause", None)  # ray.exceptions.RayTaskError keeps the user's exception here
        below = cause if isinstance(cause, BaseException) else error.__cause__ or error.__context__
        if isinstance(error, CremError) or below is None:
            return error
        error = below
    return error
