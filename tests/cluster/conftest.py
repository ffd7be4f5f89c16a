"""One local Ray cluster of two nodes for the tests of this folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from cluster.local import LocalCluster


def members_of(sessions: set[int]) -> list[int]:
    """Processes of these sessions, zombies included."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):  # ended meanwhile
            if os.getsid(pid) in sessions:
                found.append(pid)
    return found


@pytest.fixture(scope="package")
def local_cluster() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=2, cpus_per_node=2) as cluster:
        yield cluster
        sessions = cluster.sessions()
    assert members_of(sessions) == [], "stopping the cluster left processes behind"
