"""The most memory that the processes of a Ray job hold: the driver, its workers and the object store.

Memory is what a process does not share (resident less shared pages).
"""

from __future__ import annotations

import psutil
import ray

__all__ = ["Peaks"]


class Peaks:
    """The most that this process, any worker, all workers and the object store held, in MB."""

    def __init__(self) -> None:
        self.mb = [0.0] * 4
        self._began: dict[int, float] = {}
        self._cpu: dict[int, float] = {}
        self._store = ray.cluster_resources()["object_store_memory"]

    def sample(self) -> None:
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            self._count_cpu(process)
        self._began = self._began or dict(self._cpu)
        workers = [_private(child) for child in me.children(recursive=True) if _is_worker(child)]
        store = (self._store - ray.available_resources().get("object_store_memory", 0)) / 1e6
        now = [_private(me), max(workers, default=0.0), sum(workers), store]
        self.mb = [max(before, value) for before, value in zip(self.mb, now, strict=True)]

    @property
    def cpu_s(self) -> float:
        """Processor time of all processes together since the first sample, also of those that ended."""
        return sum(self._cpu.values()) - sum(self._began.values())

    def _count_cpu(self, process: psutil.Process) -> None:
        try:
            times = process.cpu_times()
        except psutil.Error:
            return
        self._cpu[process.pid] = times.user + times.system


def _private(process: psutil.Process) -> float:
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0.0
    return float(memory.rss - memory.shared) / 1e6


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("ray::" in part for part in process.cmdline()[:1])
    except psutil.Error:
        return False
