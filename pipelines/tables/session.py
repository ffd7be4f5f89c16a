"""Where the jobs meet Ray: connecting to it, and checking that a job fits."""

from __future__ import annotations

import logging
import os
import sys

import ray
import ray.data

from crem.doctor import refuse_ray_client
from crem.errors import ResourceError

__all__ = ["cluster_address", "connect", "cpus", "on_cluster", "require"]

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 512 * 2**20
"""Object store of a Ray started here. Training rows and their images pass through it; it spills to disk."""
_MIN_LOGICAL_CPUS = 4
"""A two-core machine still gets room for two train workers beside their data tasks."""


def connect() -> None:
    """Connect to Ray once: one that is initialised, else ``RAY_ADDRESS``, else one started here for this process.

    Raises:
        ConfigError: ``RAY_ADDRESS`` is a Ray Client address. ResourceError: no cluster answers there, or this machine
            is too busy to start Ray.
    """
    _quieten_data()
    if ray.is_initialized():
        return
    if address := cluster_address():
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
    try:
        ray.init(
            address="local",
            num_cpus=max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.ERROR,  # at WARNING every start explains token authentication
            log_to_driver=log.isEnabledFor(logging.DEBUG),  # crem --verbose
        )
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no type for it
            raise
        raise ResourceError(
            "Ray did not start on this machine in 30 s: other programs use its CPUs or memory; end some, or run the "
            "same command again"
        ) from error


def _quieten_data() -> None:
    """Show Ray Data's progress bars on a terminal only, and its warnings only with --verbose."""
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    if log.isEnabledFor(logging.DEBUG):
        return
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # that there are no progress bars
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)


def on_cluster() -> bool:
    """Whether jobs run on a cluster rather than on a Ray that they start themselves."""
    return ray.is_initialized() or bool(cluster_address())


def cluster_address() -> str:
    """``RAY_ADDRESS`` where it names a cluster, else the empty string."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def cpus() -> float:
    """Of the nodes that are there now."""
    return float(ray.cluster_resources().get("CPU", 0))


def require(job: str, *, cpus: float, gpus: float, remedy: str) -> None:
    """Refuse a job that would wait forever for devices.

    On a cluster (``RAY_ADDRESS``) this is only a warning: its autoscaler can still add the node.

    Raises:
        ResourceError: this machine has too few CPUs or GPUs.
    """
    available = ray.cluster_resources()
    needs = {"CPU": cpus, "GPU": gpus}
    short = [name for name, need in needs.items() if need > available.get(name, 0)]
    if not short:
        return
    wanted, present = (" and ".join(f"{of.get(name, 0):g} {name}" for name in short) for of in (needs, available))
    message = f"{job} needs {wanted}, and Ray has {present} here; {remedy}"
    if not cluster_address():
        raise ResourceError(message)
    log.warning("%s (unless the cluster grows)", message)
