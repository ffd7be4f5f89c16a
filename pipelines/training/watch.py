"""A hung worker is found, named and killed, so that Ray Train's failure policy restarts the run from its checkpoint.

A rank that hangs takes all others with it, silently: they wait for it in a collective. Therefore every worker sends
heartbeats: once a second a thread reports to an actor beside the driver which phase the main thread is in, and for how
long. The driver judges (``hung``, a pure function):

- *silent*: no heartbeat for ``train.hang_timeout_s`` while other ranks send theirs. The process or its machine stopped.
- *stuck*: the main thread has been in one phase for as long, and another rank is in a later one, waiting for it.

It is killed from a task on its node, which first asks the process for its stacks (``faulthandler``): they show where it
hung. Starting, and phases that write files, may take long and never count as stuck; and a start that is silent, since
imports on a busy machine leave the thread no time, is ended only if the process is stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crem.train.callbacks import Callback
from crem.train.phases import Phase

__all__ = ["HangWatch", "Heartbeat", "HeartbeatSender", "hung", "kill_process", "stacks_file", "write_stacks_on_signal"]

log = logging.getLogger(__name__)

_INTERVAL_S = 1.0
"""Between heartbeats, and between looks at them."""
_STACKS_S = 2.0
"""How long a process gets to write its stacks; a stopped one never does."""


@dataclass(frozen=True)
class Heartbeat:
    """One sign of life of a rank."""

    rank: int
    ranks: int
    node: str
    """Ray's id of the node"""
    host: str
    pid: int
    created: float
    """start of the process, which together with the pid identifies it"""
    step: int
    phase: Phase
    in_phase_s: float
    """time since the main thread entered the phase"""

    @property
    def position(self) -> tuple[int, int]:
        """How far the main thread has come."""
        return self.step, self.phase.order

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks} (node {self.host}, pid {self.pid}) at step {self.step}, {self.phase}"


def hung(heartbeats: Sequence[Heartbeat], silent_s: Sequence[float], timeout_s: float) -> tuple[Heartbeat, str] | None:
    """The rank that holds up the others, and the evidence; ``None`` if there is none.

    Args:
        heartbeats: the last one of each rank.
        silent_s: time since then, for each.
    """
    silent = [beat for beat, age in zip(heartbeats, silent_s, strict=True) if age > timeout_s]
    # all workers silent: the driver is at fault
    if silent and (len(silent) < len(heartbeats) or len(heartbeats) == 1):
        return silent[0], f"it has given no sign of life for {timeout_s:g} s"
    furthest = max((beat.position for beat in heartbeats), default=(0, 0))
    stuck = [
        beat
        for beat in heartbeats
        if beat.in_phase_s > timeout_s and beat.position < furthest and beat.phase.has_time_limit
    ]
    if stuck:
        first = min(stuck, key=lambda beat: beat.position)
        return first, f"it has been there for {first.in_phase_s:.0f} s while others wait for it further on"
    return None


class _Board:
    """The last heartbeat of each rank, and when it came."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[Heartbeat, float]] = {}

    def receive(self, beat: Heartbeat) -> None:
        known = self._last.get(beat.rank)
        if known and known[0].created > beat.created:
            return  # a late one of a worker that has been replaced
        self._last[beat.rank] = (beat, time.monotonic())
        if len(self._last) > beat.ranks:  # the run continues with fewer workers
            self._last = {rank: entry for rank, entry in self._last.items() if rank < beat.ranks}

    def read(self) -> tuple[list[Heartbeat], list[float]]:
        now = time.monotonic()
        return [beat for beat, _ in self._last.values()], [now - at for _, at in self._last.values()]

    def clear(self) -> None:
        self._last.clear()


class HeartbeatSender(Callback):
    """In a worker: sends heartbeats until the process ends. ``on_phase`` is called by the main thread."""

    def __init__(self, board: Any, *, rank: int, ranks: int):
        process = psutil.Process()
        self._board, self._rank, self._ranks = board, rank, ranks
        self._node, self._host = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        self._pid, self._created = process.pid, process.create_time()
        self._position = (0, Phase.STARTING, time.monotonic())
        self._stacks = write_stacks_on_signal()
        threading.Thread(target=self._send, daemon=True, name="crem-heartbeat").start()

    def on_phase(self, step: int, phase: Phase) -> None:
        self._position = (step, phase, time.monotonic())

    def _send(self) -> None:
        while True:
            step, phase, since = self._position
            beat = Heartbeat(
                rank=self._rank,
                ranks=self._ranks,
                node=self._node,
                host=self._host,
                pid=self._pid,
                created=self._created,
                step=step,
                phase=phase,
                in_phase_s=time.monotonic() - since,
            )
            try:
                self._board.receive.remote(beat)
            except Exception:  # the driver is gone, and the board with it
                return
            time.sleep(_INTERVAL_S)


class HangWatch:
    """In the driver: owns the board, judges once a second, names and kills a rank that hangs."""

    def __init__(self, timeout_s: float):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = ray.remote(num_cpus=0)(_Board).options(scheduling_strategy=here).remote()
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="crem-watch")

    def __enter__(self) -> HangWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        ray.kill(self.board)

    def _watch(self) -> None:
        while not self._stop.wait(min(_INTERVAL_S, self._timeout_s / 4)):
            try:
                heartbeats, silent_s = ray.get(self.board.read.remote(), timeout=30)
                found = hung(heartbeats, silent_s, self._timeout_s)
                if found is not None:
                    self._kill(*found, heartbeats)
            except ray.exceptions.GetTimeoutError:
                log.warning("the watch for hung workers got no answer for 30 s: the driver's node is overloaded")
            except Exception:  # a run does not end because its watch failed
                log.warning("the watch for hung workers failed once", exc_info=True)

    def _kill(self, beat: Heartbeat, reason: str, heartbeats: Sequence[Heartbeat]) -> None:
        there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
        task: Callable[..., Any] = (
            ray.remote(num_cpus=0, max_retries=0)(kill_process).options(scheduling_strategy=there).remote
        )
        try:
            state, stacks = ray.get(task(beat.pid, beat.created, only_stopped=beat.phase == Phase.STARTING), timeout=60)
        except Exception as error:
            state, stacks = f"its node does not answer ({type(error).__name__})", ""
        ray.get(self.board.clear.remote(), timeout=30)
        if state in ("gone", "busy"):  # it ended by itself, and Ray knows; or it gets another timeout
            return
        others = "; ".join(f"rank {b.rank} at step {b.step}, {b.phase}" for b in heartbeats if b.rank != beat.rank)
        log.error(
            "%s hangs: %s (train.hang_timeout_s). State of the process: %s. %s. It is killed; train.max_failures is "
            "how often a run restarts from its last checkpoint.%s",
            *(beat, reason, state, others or "there are no other ranks", f"\n{stacks}" if stacks else ""),
        )


def write_stacks_on_signal() -> IO[str]:
    """On SIGUSR1 write the stacks of all threads of this process to ``stacks_file``; keep the returned file open."""
    path = stacks_file(os.getpid())
    file = open(path, "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    atexit.register(path.unlink, missing_ok=True)
    return file


def stacks_file(pid: int) -> Path:
    """Where a process of this machine writes its stacks."""
    return Path(tempfile.gettempdir()) / f"crem-stacks-{os.getuid()}-{pid}.txt"


def kill_process(pid: int, created: float, *, only_stopped: bool = False) -> tuple[str, str]:
    """Run on the worker's node: kill the process, and return its state before that and its stacks.

    The state is "gone" if that process has ended. With ``only_stopped`` one that still runs is left alone ("busy").
    """
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - created) > 1:
            return "gone", ""
        state, stacks = process.status(), stacks_file(pid)
        if state not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            if only_stopped:
                return "busy", ""
            process.send_signal(signal.SIGUSR1)
            time.sleep(_STACKS_S)
        process.kill()
    except psutil.NoSuchProcess:
        return "gone", ""
    text = ""
    with contextlib.suppress(OSError):
        text = stacks.read_text(errors="replace")
        stacks.unlink()
    return state, text
