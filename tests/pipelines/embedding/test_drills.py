"""A part of the drills: real nodes in network namespaces, real kills, and the rows that are left."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.pipelines.embedding.drill_cluster import namespaces_work

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not namespaces_work(), reason="needs root and Linux network namespaces"),
]


def test_a_job_outlives_kills_a_partition_and_poison_with_the_rows_of_an_undisturbed_one() -> None:
    """The driver, an actor and a node are killed, a node is cut off, and three items end their process each time."""
    command = ["-m", "tests.pipelines.embedding.drills", "--count", "5", "--together", "5", "--rows", "200"]
    command += ["--kinds", "driver", "actor", "node", "partition", "poison"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("5 drills in ") and last.endswith(" jobs, 0 jobs not well: lost 0, doubled 0"), last
