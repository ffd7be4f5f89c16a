"""Resources that are missing at the start of a job and while it runs."""

from __future__ import annotations

import logging
import time

import pytest

from crem.errors import ResourceError
from pipelines.tables import cluster_resources
from pipelines.tables.cluster_resources import Need, ResourceWatch, missing_of, wait_for_resources

ACTORS, TASK = Need("actor", 2, 1, 2), Need("task", 1, 0)


def node(cpus: float, gpus: float = 0) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus}


@pytest.mark.parametrize(
    ("nodes", "missing"),
    [
        ([node(5, 2)], None),
        ([node(2, 1), node(2, 1), node(1)], None),
        ([node(4, 2)], "1 x task of 1 CPU"),
        ([node(1, 1)] * 8, "2 x actor of 2 CPU and 1 GPU (there is room for 0)"),  # in sum there is enough
        ([node(8, 1)], "2 x actor of 2 CPU and 1 GPU (there is room for 1)"),
        ([], "2 x actor of 2 CPU and 1 GPU (there is room for 0)"),
    ],
)
def test_what_has_no_room_on_the_nodes(nodes: list[dict[str, float]], missing: str | None) -> None:
    assert missing_of([ACTORS, TASK], nodes) == missing


def test_a_job_waits_at_its_start_for_a_node_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    began = time.monotonic()
    monkeypatch.setattr(cluster_resources, "_LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(cluster_resources, "_nodes", lambda: [node(1)] * (1 if time.monotonic() - began < 0.3 else 2))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    wait_for_resources("the job", [Need("actor", 1, 0), TASK], remedy="lower x")
    assert time.monotonic() - began >= 0.3
    assert caplog.messages[0].startswith(
        "the job needs 1 x task of 1 CPU, and the cluster has 1 nodes (1 CPU + 0 GPU); waiting up to 30 min"
    )
    assert caplog.messages[-1] == "the job has what it needs now" and len(caplog.messages) == 2
    with pytest.raises(ResourceError, match=r"GPU.*, after 0 s; start the nodes that are missing, or lower x"):
        wait_for_resources("the job", [ACTORS], remedy="lower x", patience_s=0)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ResourceError, match=r"has 2 nodes \(1 CPU \+ 0 GPU, 1 CPU \+ 0 GPU\); lower x$"):
        wait_for_resources("the job", [ACTORS], remedy="lower x")


def test_a_running_job_says_that_it_waits_and_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster_resources, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(cluster_resources, "_present", lambda: "the cluster has no nodes")
    present = [node(4, 2)]
    with ResourceWatch("the job", [ACTORS], lambda: list(present)):
        time.sleep(0.1)
        present.clear()
        time.sleep(0.2)
        present.append(node(4, 2))
        time.sleep(0.2)
    assert caplog.messages == [
        "the job waits: it needs 2 x actor of 2 CPU and 1 GPU (there is room for 0), and the cluster has no nodes; "
        "it goes on when a node joins",
        "the job goes on: the cluster has what it needs again",
    ]
