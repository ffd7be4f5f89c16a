"""A worker that hangs is named and killed: the judgement as a function, real stopped processes, a real training run."""

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
from pipelines.corpus.prepare import prepare
from pipelines.training.train import train
from pipelines.training.watch import Beat, Heart, Watch, _kill, _stacks_file, hung
from tests.pipelines.shapes import write_corpus
from tests.pipelines.training.test_train import RUN


def beat(rank: int, step: int, phase: str, standing_s: float = 0.0, ranks: int = 2) -> Beat:
    return Beat(rank, ranks, "node", "10.0.0.1", 100 + rank, 1.0, step, phase, standing_s)


def test_a_silent_rank_is_named() -> None:
    beats = [beat(0, 7, "forward and backward"), beat(1, 7, "waiting for rows")]
    assert hung(beats, [0.5, 9.0], 10) is None
    found = hung(beats, [0.5, 11.0], 10)
    assert found is not None and found[0].rank == 1 and "no sign of life for 10 s" in found[1]
    assert str(found[0]) == "rank 1 of 2 (node 10.0.0.1, pid 101) at step 7, waiting for rows"


def test_where_nobody_is_heard_nobody_is_guilty() -> None:
    beats = [beat(0, 7, "forward and backward"), beat(1, 7, "forward and backward")]
    assert hung(beats, [30.0, 30.0], 10) is None
    assert hung(beats[:1], [30.0], 10) is not None  # but a lone worker has nobody to be compared with
    assert hung([], [], 10) is None


def test_a_rank_that_stands_still_is_named_if_others_are_further() -> None:
    waiting = [beat(0, 7, "forward and backward", 60), beat(1, 7, "waiting for rows", 61)]
    found = hung(waiting, [0, 0], 50)
    assert found is not None and found[0].rank == 1 and "61 s" in found[1]
    assert hung(waiting, [0, 0], 70) is None
    together = [beat(r, 7, "forward and backward", 60) for r in (0, 1)]
    assert hung(together, [0, 0], 50) is None, "nobody waits for the other"
    later = [beat(0, 8, "waiting for rows", 60), beat(1, 7, "validation", 61)]
    found = hung(later, [0, 0], 50)
    assert found is not None and found[0].rank == 1


@pytest.mark.parametrize("phase", ["starting", "checkpoint", "export", "finished"])
def test_what_may_take_long_is_not_judged(phase: str) -> None:
    assert hung([beat(0, 7, phase, 900), beat(1, 8, "forward and backward", 899)], [0, 0], 50) is None


def stopped(process: psutil.Process) -> None:
    """Stop a process as ``kill -STOP`` does, and wait until it stands."""
    process.send_signal(signal.SIGSTOP)
    while process.status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)


def test_a_stopped_process_is_killed_and_another_of_its_number_is_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process = psutil.Process(child.pid)
    assert _kill(child.pid, process.create_time(), only_stopped=True) == ("busy", "")
    stopped(process)
    assert _kill(child.pid, process.create_time() + 60) == ("gone", "")
    assert process.is_running()
    assert _kill(child.pid, process.create_time(), only_stopped=True) == (psutil.STATUS_STOPPED, "")
    assert child.wait(timeout=20) == -signal.SIGKILL
    assert _kill(child.pid, 0.0) == ("gone", "")


def test_a_process_that_stands_says_where_before_it_is_killed() -> None:
    code = """if True:
        import time
        from pipelines.training.watch import _stacks_on_request
        def stand():
            print("standing", flush=True)
            time.sleep(600)
        held = _stacks_on_request()
        stand()
    """
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "standing\n"
    state, stacks = _kill(child.pid, psutil.Process(child.pid).create_time())
    assert state != psutil.STATUS_STOPPED and "in stand" in stacks
    assert child.wait(timeout=20) == -signal.SIGKILL
    assert not _stacks_file(child.pid).exists()


@ray.remote(num_cpus=0.1)
class Worker:
    """A rank that beats and, if told so, stands still in a function with a name."""

    def __init__(self, pulse: Any, rank: int):
        self.heart = Heart(pulse, rank=rank, ranks=2)

    def go(self, step: int, phase: str) -> int:
        self.heart.phase(step, phase)
        return psutil.Process().pid

    def stand(self) -> None:
        time.sleep(600)


@pytest.mark.ray
@pytest.mark.parametrize("how", ["stopped", "standing"])
def test_watch_names_and_kills_a_real_worker(how: str, local_ray: None, caplog: pytest.LogCaptureFixture) -> None:
    """``stopped`` by SIGSTOP; ``standing`` in a call while the other rank is further: then its stacks are told too."""
    caplog.set_level(logging.ERROR, logger="pipelines.training.watch")
    watch = Watch(6.0 if how == "stopped" else 12.0)
    workers = [Worker.remote(watch.pulse, rank) for rank in (0, 1)]
    pids = ray.get(
        [w.go.remote(3, phase) for w, phase in zip(workers, ("validation", "waiting for rows"), strict=True)]
    )
    deadline = time.monotonic() + 60
    while {b.phase for b in ray.get(watch.pulse.read.remote())[0]} != {"validation", "waiting for rows"}:
        assert time.monotonic() < deadline, "both ranks have told where they are"
        time.sleep(0.1)
    with watch:
        if how == "stopped":
            stopped(psutil.Process(pids[1]))
        else:
            workers[1].stand.remote()
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(workers[1].go.remote(4, "validation"), timeout=120)
        deadline = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.1)
    (said,) = caplog.messages
    assert "rank 1 of 2" in said and f"pid {pids[1]}) at step 3, waiting for rows hangs" in said
    assert "rank 0 at step 3, validation" in said
    assert ("State of the process: stopped" in said) == (how == "stopped")
    assert ("in stand" in said) == (how == "standing")
    assert ray.get(workers[0].go.remote(4, "validation"), timeout=60) == pids[0], "the other one lives"
    ray.kill(workers[0])


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_with_a_stopped_worker_goes_on(tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture) -> None:
    """SIGSTOP on one of two training workers: it is named, killed, and Ray Train goes on from the checkpoint."""
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
    said = [m for m in caplog.messages if "hangs" in m]
    assert len(said) == 1 and f"pid {pid})" in said[0] and "State of the process: stopped" in said[0]
    assert result["steps"] == 40
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 41))
