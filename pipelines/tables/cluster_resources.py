"""What a job needs of a cluster whose nodes come and go: waiting at its start, and a word while it waits later.

Ray itself waits without end and without a word for a node that is gone, and it looks at sums: an actor that needs 4
CPUs waits where four nodes have one each.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from crem.errors import ResourceError
from pipelines.tables import session
from pipelines.tables.regular_calls import RegularCalls

__all__ = ["Need", "ResourceWatch", "wait_for_resources"]

log = logging.getLogger(__name__)

_PATIENCE_S = 1800.0
"""How long a job waits at its start for nodes to join: an autoscaler brings a GPU node in 5 to 20 minutes."""
_LOOK_EVERY_S = 5.0
_SAY_EVERY_S = 60.0


@dataclass(frozen=True)
class Need:
    """Resources of which ``count`` are needed, each on one node."""

    what: str
    cpus: float
    gpus: float
    count: int = 1

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.count} x {self.what} of {self.cpus:g} CPU{gpus}"


def wait_for_resources(job: str, needs: Sequence[Need], *, remedy: str, patience_s: float = _PATIENCE_S) -> None:
    """Wait until the nodes of the cluster have room for all needs, and say what is missing.

    A Ray that was started for this job alone never grows: there it is an error at once.

    Raises:
        ResourceError: the nodes did not come.
    """
    deadline, said = time.monotonic() + patience_s, -_SAY_EVERY_S
    while (missing := missing_of(needs, _nodes())) is not None:
        message = f"{job} needs {missing}, and {_present()}"
        if not session.cluster_address():
            raise ResourceError(f"{message}; {remedy}")
        if time.monotonic() > deadline:
            raise ResourceError(
                f"{message}, after {patience_s:.0f} s; start the nodes that are missing, or {remedy}; the same command "
                "continues"
            )
        if time.monotonic() - said >= _SAY_EVERY_S:
            said = time.monotonic()
            log.warning("%s; waiting up to %.0f min for nodes to join", message, (deadline - said) / 60)
        time.sleep(_LOOK_EVERY_S)
    if said > 0:
        log.info("%s has what it needs now", job)


def missing_of(needs: Sequence[Need], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """The first of these needs for which the nodes have no room, in words; they are placed one after the other."""
    left = [dict(node) for node in nodes]
    for need in needs:
        for placed in range(need.count):
            room = next((n for n in left if n.get("CPU", 0) >= need.cpus and n.get("GPU", 0) >= need.gpus), None)
            if room is None:
                return f"{need}" if need.count == 1 else f"{need} (there is room for {placed})"
            room["CPU"] = room.get("CPU", 0) - need.cpus
            room["GPU"] = room.get("GPU", 0) - need.gpus
    return None


class ResourceWatch(RegularCalls):
    """While a job runs, says when no node could run what it needs, and when one can again; a context."""

    def __init__(self, job: str, needs: Sequence[Need], nodes: Callable[[], list[dict[str, float]]] | None = None):
        super().__init__(_LOOK_EVERY_S, "resources")
        self._said = 0.0
        self.job, self.needs, self._nodes = job, needs, nodes or _nodes

    def call(self) -> None:
        """Look at the nodes."""
        try:
            missing = missing_of(self.needs, self._nodes())
        except Exception as error:  # the head does not answer; the job itself will say so
            log.debug("the nodes are not known now: %s", error)
            return
        now = time.monotonic()
        if missing is None and self._said:
            log.warning("%s goes on: the cluster has what it needs again", self.job)
            self._said = 0.0
        elif missing is not None and (not self._said or now - self._said >= _SAY_EVERY_S):
            log.warning("%s waits: it needs %s, and %s; it goes on when a node joins", self.job, missing, _present())
            self._said = now


def _nodes() -> list[dict[str, float]]:
    """CPUs and GPUs of each node that is alive."""
    nodes: list[dict[str, Any]] = ray.nodes()
    return [{name: float(node["Resources"].get(name, 0)) for name in ("CPU", "GPU")} for node in nodes if node["Alive"]]


def _present() -> str:
    nodes = _nodes()
    shown = ", ".join(f"{node['CPU']:g} CPU + {node['GPU']:g} GPU" for node in nodes[:8]) + " …" * (len(nodes) > 8)
    return f"the cluster has {len(nodes)} nodes ({shown})" if nodes else "the cluster has no nodes"
