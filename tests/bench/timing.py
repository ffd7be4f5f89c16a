"""Timing for benchmarks: variants interleaved in one run, so that a busy machine slows all of them; medians.

With one thread on a CPU the clock is the process's CPU time, which does not run while others have the core.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["environment", "interleaved", "table"]


def interleaved(
    variants: Mapping[str, Callable[[], Callable[[], object]]], repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each variant; every round runs all of them, after one round that is not counted.

    Args:
        variants: each prepares a run, outside of the clock, and returns it.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(repeats + 1):
        for name, prepare in variants.items():
            run = prepare()
            _wait(device)
            start = clock()
            run()
            _wait(device)
            if round_number:
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def environment(device: str) -> str:
    """Device, torch version and threads, for the line above a table."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)."


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
