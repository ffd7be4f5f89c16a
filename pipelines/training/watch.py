"""A hung worker is found, named and killed, so that Ray Train's failure policy restarts the run from its checkpoint.

A rank that hangs takes all others with it, silently: they wait for it in a collective. Therefore every worker beats: a
thread tells an actor beside the driver, once a second, where the main thread stands and for how long. The driver judges
(``hung``, a pure function):

- *silent*: no beat for ``train.hang_timeout_s`` while other ranks beat. The process is stopped, or its machine is.
- *standing*: the main thread has been at one point for as long, and another rank stands at a later one, waiting for it.

It is killed from a task on its node, which first asks the process for its stacks (``faulthandler``): they say where it
stood. Phases that may rightly take long, the start and what writes files, never count as standing; and a start that
is silent, since imports on a busy machine leave the thread no turn, is ended only if the process is stopped.
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

from crem.train.phases import PHASES

__all__ = ["Beat", "Heart", "Watch", "hung"]

log = logging.getLogger(__name__)

_BEAT_S = 1.0
_STACKS_S = 2.0
"""How long a process gets to write down its stacks; a stopped one never does."""
_LONG = ("starting", "checkpoint", "export", "finished")
"""Phases in which standing still is no fault."""


@dataclass(frozen=True)
class Beat:
    """One sign of life of a rank."""

    rank: int
    ranks: int
    node: str
    """Ray's id of the node"""
    host: str
    pid: int
    created: float
    """start of the process, which with the pid names it for good"""
    step: int
    phase: str
    standing_s: float
    """time since the main thread came to this phase"""

    @property
    def point(self) -> tuple[int, int]:
        """How far the main thread is."""
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks} (node {self.host}, pid {self.pid}) at step {self.step}, {self.phase}"


def hung(beats: Sequence[Beat], silent_s: Sequence[float], timeout_s: float) -> tuple[Beat, str] | None:
    """The rank that holds the others up, and how it is known; None where nobody does.

    Args:
        beats: the last one of each rank.
        silent_s: time since then, for each.
    """
    silent = [beat for beat, age in zip(beats, silent_s, strict=True) if age > timeout_s]
    if silent and (len(silent) < len(beats) or len(beats) == 1):  # all silent: it is we who do not hear
        return silent[0], f"it has given no sign of life for {timeout_s:g} s"
    last = max((beat.point for beat in beats), default=(0, 0))
    behind = [b for b in beats if b.standing_s > timeout_s and b.point < last and b.phase not in _LONG]
    if behind:
        first = min(behind, key=lambda beat: beat.point)
        return first, f"it has stood there for {first.standing_s:.0f} s while others wait for it at a later point"
    return None


@ray.remote(num_cpus=0)
class _Pulse:
    """Last beat of each rank, and when it came."""

    def __init__(self) -> None:
        self._beats: dict[int, tuple[Beat, float]] = {}

    def beat(self, beat: Beat) -> None:
        held = self._beats.get(beat.rank)
        if held and held[0].created > beat.created:
            return  # a late word of a worker that has been replaced
        self._beats[beat.rank] = (beat, time.monotonic())
        if len(self._beats) > beat.ranks:  # the run went on with fewer workers
            self._beats = {rank: held for rank, held in self._beats.items() if rank < beat.ranks}

    def read(self) -> tuple[list[Beat], list[float]]:
        now = time.monotonic()
        return [b for b, _ in self._beats.values()], [now - at for _, at in self._beats.values()]

    def forget(self) -> None:
        self._beats.clear()


class Heart:
    """In a worker: beats until the process ends. ``phase`` is called by the main thread."""

    def __init__(self, pulse: Any, *, rank: int, ranks: int):
        process = psutil.Process()
        self._pulse, self._rank, self._ranks = pulse, rank, ranks
        self._who = (ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), process.pid)
        self._created = process.create_time()
        self._at = (0, "starting", time.monotonic())
        self._stacks = _stacks_on_request()
        threading.Thread(target=self._beat, daemon=True, name="crem-heart").start()

    def phase(self, step: int, phase: str) -> None:
        """The main thread has come to ``phase`` of ``step``."""
        self._at = (step, phase, time.monotonic())

    def _beat(self) -> None:
        node, host, pid = self._who
        while True:
            step, phase, since = self._at
            beat = Beat(
                *(self._rank, self._ranks, node, host, pid, self._created), step, phase, time.monotonic() - since
            )
            try:
                self._pulse.beat.remote(beat)
            except Exception:  # the driver has gone, and with it whoever would listen
                return
            time.sleep(_BEAT_S)


class Watch:
    """In the driver: makes the actor, judges once a second, names and kills who hangs."""

    def __init__(self, timeout_s: float):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.pulse = _Pulse.options(scheduling_strategy=here).remote()
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="crem-watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        ray.kill(self.pulse)

    def _watch(self) -> None:
        while not self._stop.wait(min(_BEAT_S, self._timeout_s / 4)):
            try:
                beats, silent_s = ray.get(self.pulse.read.remote(), timeout=30)
                found = hung(beats, silent_s, self._timeout_s)
                if found is not None:
                    self._end(*found, beats)
            except ray.exceptions.GetTimeoutError:
                log.warning("the watch over hung workers has heard nothing for 30 s: the driver's node is overloaded")
            except Exception:  # a run does not end because its watch failed
                log.warning("the watch over hung workers failed once", exc_info=True)

    def _end(self, beat: Beat, reason: str, beats: Sequence[Beat]) -> None:
        there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
        task: Callable[..., Any] = (
            ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there).remote
        )
        try:
            state, stacks = ray.get(task(beat.pid, beat.created, only_stopped=beat.phase == "starting"), timeout=60)
        except Exception as error:
            state, stacks = f"its node does not answer ({type(error).__name__})", ""
        ray.get(self.pulse.forget.remote(), timeout=30)
        if state in ("gone", "busy"):  # it ended by itself, and Ray knows; or it gets another time as long
            return
        others = "; ".join(f"rank {b.rank} at step {b.step}, {b.phase}" for b in beats if b.rank != beat.rank)
        log.error(
            "%s hangs: %s (train.hang_timeout_s). State of the process: %s. %s. It is killed; train.max_failures says "
            "how often a run starts again from its last checkpoint.%s",
            *(beat, reason, state, others or "there are no other ranks", f"\n{stacks}" if stacks else ""),
        )


def _stacks_on_request() -> IO[str]:
    """On SIGUSR1 the stacks of all threads of this process go into a file that stays open, whatever they do."""
    path = _stacks_file(os.getpid())
    file = open(path, "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    atexit.register(path.unlink, missing_ok=True)
    return file


def _stacks_file(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"crem-stacks-{os.getuid()}-{pid}.txt"


def _kill(pid: int, created: float, *, only_stopped: bool = False) -> tuple[str, str]:
    """On the worker's node: its state ("gone" where that process is no more) and stacks; then it is killed.

    With ``only_stopped`` one that still runs is left alone ("busy").
    """
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - created) > 1:
            return "gone", ""
        state, stacks = process.status(), _stacks_file(pid)
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
