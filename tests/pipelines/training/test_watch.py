"""A worker that hangs is named and killed: the decision as a function, real stopped processes, a real training run."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from crem.config import load_config
from crem.train.phases import Phase
from pipelines.corpus.prepare import prepare
from pipelines.training.train import train
from pipelines.training.watch import HangWatch, Heartbeat, HeartbeatSender, hung, kill_process, stacks_file
from tests.pipelines.shapes import write_corpus
from tests.pipelines.training.test_train import RUN


def beat(rank: int, step: int, phase: Phase, in_phase_s: float = 0.0, ranks: int = 2) -> Heartbeat:
    return Heartbeat(rank, ranks, "node", "10.0.0.1", 100 + rank, 1.0, step, phase, in_phase_s)


def test_a_silent_rank_is_named() -> None:
    beats = [beat(0, 7, Phase.COMPUTE), beat(1, 7, Phase.ROWS)]
    assert hung(beats, [0.5, 9.0], 10) is None
    found = hung(beats, [0.5, 11.0], 10)
    assert found is not None and found[0].rank == 1 and "no sign of life for 10 s" in found[1]
    assert str(found[0]) == "rank 1 of 2 (node 10.0.0.1, pid 101) at step 7, waiting for rows"


def test_if_all_ranks_are_silent_none_is_named() -> None:
    beats = [beat(0, 7, Phase.COMPUTE), beat(1, 7, Phase.COMPUTE)]
    assert hung(beats, [30.0, 30.0], 10) is None
    assert hung(beats[:1], [30.0], 10) is not None  # a single worker cannot be compared
    assert hung([], [], 10) is None


def test_a_stuck_rank_is_named_if_others_are_further() -> None:
    waiting = [beat(0, 7, Phase.COMPUTE, 60), beat(1, 7, Phase.ROWS, 61)]
    found = hung(waiting, [0, 0], 50)
    assert found is not None and found[0].rank == 1 and "61 s" in found[1]
    assert hung(waiting, [0, 0], 70) is None
    together = [beat(r, 7, Phase.COMPUTE, 60) for r in (0, 1)]
    assert hung(together, [0, 0], 50) is None, "neither waits for the other"
    later = [beat(0, 8, Phase.ROWS, 60), beat(1, 7, Phase.VALIDATION, 61)]
    found = hung(later, [0, 0], 50)
    assert found is not None and found[0].rank == 1


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.CHECKPOINT, Phase.EXPORT, Phase.FINISHED])
def test_phases_without_a_time_limit_are_not_stuck(phase: Phase) -> None:
    assert hung([beat(0, 7, phase, 900), beat(1, 8, Phase.COMPUTE, 899)], [0, 0], 50) is None


def stopped(process: psutil.Process) -> None:
    """Stop a process as ``kill -STOP`` does, and wait until it has stopped."""
    process.send_signal(signal.SIGSTOP)
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)


def test_a_stopped_process_is_killed_and_another_of_the_same_pid_is_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process = psutil.Process(child.pid)
    assert kill_process(child.pid, process.create_time(), only_stopped=True) == ("busy", "")
    stopped(process)
    assert kill_process(child.pid, process.create_time() + 60) == ("gone", "")
    assert process.is_running()
    assert kill_process(child.pid, process.create_time(), only_stopped=True) == (psutil.STATUS_STOPPED, "")
    assert child.wait(timeout=20) == -signal.SIGKILL
    assert kill_process(child.pid, 0.0) == ("gone", "")


def test_a_stuck_process_shows_its_stacks_before_it_is_killed() -> None:
    code = """if True:
        import time
        from pipelines.training.watch import write_stacks_on_signal
        def get_stuck():
            print("stuck", flush=True)
            time.sleep(600)
        file = write_stacks_on_signal()
        get_stuck()
    """
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "stuck\n"
    state, stacks = kill_process(child.pid, psutil.Process(child.pid).create_time())
    assert state != psutil.STATUS_STOPPED and "in get_stuck" in stacks
    assert child.wait(timeout=20) == -signal.SIGKILL
    assert not stacks_file(child.pid).exists()


@ray.remote(num_cpus=0.1)
class Worker:
    """A rank that sends heartbeats and, on request, gets stuck in a named function."""

    def __init__(self, board: Any, rank: int):
        self.heartbeat = HeartbeatSender(board, rank=rank, ranks=2)

    def go(self, step: int, phase: Phase) -> int:
        self.heartbeat.on_phase(step, phase)
        return psutil.Process().pid

    def get_stuck(self) -> None:
        time.sleep(600)


@pytest.mark.ray
@pytest.mark.parametrize("how", ["stopped", "stuck"])
def test_watch_names_and_kills_a_real_worker(how: str, local_ray: None, caplog: pytest.LogCaptureFixture) -> None:
    """``stopped`` by SIGSTOP; ``stuck`` in a call while the other rank is further: then its stacks are logged too."""
    caplog.set_level(logging.ERROR, logger="pipelines.training.watch")
    watch = HangWatch(6.0 if how == "stopped" else 12.0)
    workers = [Worker.remote(watch.board, rank) for rank in (0, 1)]
    pids = ray.get([w.go.remote(3, phase) for w, phase in zip(workers, (Phase.VALIDATION, Phase.ROWS), strict=True)])
    deadline = time.monotonic() + 60
    while {b.phase for b in ray.get(watch.board.read.remote())[0]} != {Phase.VALIDATION, Phase.ROWS}:
        assert time.monotonic() < deadline, "both ranks have sent their phase"
        time.sleep(0.1)
    with watch:
        if how == "stopped":
            stopped(psutil.Process(pids[1]))
        else:
            workers[1].get_stuck.remote()
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(workers[1].go.remote(4, Phase.VALIDATION), timeout=120)
        deadline = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.1)
    (logged,) = caplog.messages
    assert "rank 1 of 2" in logged and f"pid {pids[1]}) at step 3, waiting for rows hangs" in logged
    assert "rank 0 at step 3, validation" in logged
    assert ("State of the process: stopped" in logged) == (how == "stopped")
    assert ("in get_stuck" in logged) == (how == "stuck")
    assert ray.get(workers[0].go.remote(4, Phase.VALIDATION), timeout=60) == pids[0], "the other one lives"
    ray.kill(workers[0])


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_with_a_stopped_worker_continues(
    tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGSTOP on one of two training workers: it is named, killed, and Ray Train continues from the checkpoint."""
    caplog.set_level(logging.INFO, logger="pipelines")
    overrides = [
        *RUN,
        "train.steps=40",
        "train.checkpoint_every=4",
        "train.hang_timeout_s=25",
        "train.validate_every=0",
    ]
    config = load_config("micro", overrides)
    prepare(write_corpus(tmp_path / "corpus"), str(tmp_path / "prepared"), config)
    metrics, victims = tmp_path / "run" / "metrics.jsonl", []

    def stop_one() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 6:
            time.sleep(0.05)
        family = psutil.Process().children(recursive=True)
        workers = [p for p in family if "RayTrainWorker" in " ".join(p.cmdline())]
        stopped(workers[-1])
        victims.append((workers[-1].pid, len(workers)))

    stopper = threading.Thread(target=stop_one, daemon=True)
    stopper.start()
    result = train(str(tmp_path / "prepared"), str(tmp_path / "run"), config)
    stopper.join(timeout=1)
    ((pid, count),) = victims
    assert count == 2
    logged = [m for m in caplog.messages if "hangs" in m]
    assert len(logged) == 1 and f"pid {pid})" in logged[0] and "State of the process: stopped" in logged[0]
    assert result.steps == 40
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 41))
